"""The models that `step.py` trains: BERT encoders with random weights, every linear layer adapted at rank 8."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from paired import clock
from peft import LoraConfig, MissConfig, PeftConfig, RandLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from loratlas import AtlasLoraConfig, SRLoraConfig, attach, calibrate
from loratlas.catalog import load_entry
from loratlas.engine.calibrate import needs
from loratlas.errors import UserError
from loratlas.train.methods import build_config, trainable

FP32, BF16 = torch.float32, torch.bfloat16
RANK, VOCABULARY = 8, 1000
LONG = 10_000  # steps
EVENTS = 6  # of SRLoRA: half the pairs each, two ranks a pair, a history of 48
PARTS = ("step", "forward", "backward")
# {method of the catalogue: PEFT's arm of the same function, which is measured beside it}
TWINS = {"miss": "peft-miss", "bone": "peft-bat", "randlora": "peft-randlora"}
ARMS = ("frozen", "peft", "lora", "pissa", "srlora", "srlora-inplace")


@dataclass(frozen=True)
class Setting:
    """One encoder in one dtype; width: its hidden size."""

    name: str
    width: int
    dtype: torch.dtype
    dropout: float = 0.0
    layers: int = 6
    batch: int = 8
    length: int = 128

    def batch_of(self) -> tuple[Tensor, Tensor]:
        """(ids, goal) of the one batch that all arms see."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.length)
        ids = torch.randint(0, VOCABULARY, size, generator=generator)
        return ids, torch.randn(*size, self.width, generator=generator)

    def encoder(self) -> BertModel:
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=12,
            intermediate_size=4 * self.width,
            vocab_size=VOCABULARY,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertModel(config, add_pooling_layer=False).to(self.dtype).train()

    def arms(self) -> tuple[str, ...]:
        return ("peft", "lora") if self.dropout else ARMS


_KINDS = {"fp32": (FP32, 0.0), "bf16": (BF16, 0.0), "fp32-dropout": (FP32, 0.1), "bf16-dropout": (BF16, 0.1)}
SETTINGS = [Setting(f"d{width}-{name}", width, *kind) for width in (384, 768) for name, kind in _KINDS.items()]
QUICK = [Setting(f"tiny-{name}", 48, *kind, layers=1, batch=2, length=8) for name, kind in _KINDS.items()]


@dataclass
class Arm:
    """One model that trains.

    seconds: {part: one number a round}; event_seconds: what an SRLoRA event adds to the optimizer's step.
    """

    model: Any
    ids: Tensor
    goal: Tensor
    optimizer: torch.optim.Optimizer | None = None
    lifecycle: Any = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    saved_bytes: int = 0
    event_seconds: list[float] = field(default_factory=list)

    def loss(self) -> Tensor:
        loss = (self.model(input_ids=self.ids).last_hidden_state.float() - self.goal).square().mean()
        return loss if self.lifecycle is None else loss + self.lifecycle.terms()

    def step(self) -> dict[str, float]:
        forward, loss = clock(self.loss)
        backward, _ = clock(loss.backward)
        update, _ = clock(self.update)
        return {"forward": forward, "backward": backward, "step": forward + backward + update}

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def pass_events(self, total: int) -> None:
        """Let SRLoRA's events happen, one every other optimizer step of `total`, all on one gradient."""
        assert self.optimizer is not None
        self.loss().backward()
        seconds = [clock(self.optimizer.step)[0] for _ in range(total)]
        self.optimizer.zero_grad()
        without = statistics.median(seconds[0::2])
        self.event_seconds = [event - without for event in seconds[1:-1:2]]


def make_arm(name: str, setting: Setting, r: int = RANK) -> Arm:
    """The arm `name`: one of `ARMS`, a method of the catalogue, or one of PEFT's in `TWINS`."""
    if name == "frozen":
        # the floor: a gradient has to travel down to the embeddings, and nothing is updated
        model: Any = setting.encoder().requires_grad_(False)
        model.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        return Arm(model, *setting.batch_of())
    model = setting.encoder()
    # growth and search are measured while they go on, which a long run has not left behind when the timing begins
    total = 2 * (EVENTS + 1) if name.startswith("srlora") else LONG
    arm = adapted_arm(_config(name, setting, model, r), setting, total, model)
    if name.startswith("srlora"):
        arm.pass_events(total)
    return arm


def takes_dropout(name: str) -> bool:
    """Whether the method of the catalogue has a branch beside the weight to drop from."""
    try:
        load_entry(trainable(name))(lora_dropout=0.1)
    except UserError as error:
        if error.field != "lora_dropout":
            raise
        return False
    return True


def adapted_arm(config: PeftConfig, setting: Setting, total: int, encoder: BertModel | None = None) -> Arm:
    """The encoder, a new one unless given, with this adapter, which is told that it trains for `total` steps.

    A start that follows the data gets its statistics from one batch, the one that trains.
    """
    model: Any = encoder or setting.encoder()
    if needs(config):
        calibrate(model, config, Arm(model, *setting.batch_of()).loss, steps=1)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4, weight_decay=0.0)
    return Arm(model, *setting.batch_of(), optimizer, attach(model, optimizer, total_steps=total))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Of LoRA, A and B of one layer after the other, whoever's it is."""
    return [p for p in model.parameters() if p.requires_grad]


def _config(name: str, setting: Setting, model: nn.Module, r: int) -> PeftConfig:
    shared: dict[str, Any] = {"r": r, "target_modules": "all-linear", "lora_dropout": setting.dropout}
    # a start from few iterations: the time of a step does not depend on how exact it is
    svd: dict[str, Any] = {"svd_method": "lowrank", "svd_niter": 1}
    if name == "peft":
        return LoraConfig(**shared)
    if name in ("peft-miss", "peft-bat"):
        variant: Any = True if name == "peft-miss" else "bat"
        dropout = shared.pop("lora_dropout")
        return MissConfig(init_weights=variant, miss_dropout=dropout, **shared)
    if name == "peft-randlora":
        # r and the scaling are those of our arm; PEFT's own default of alpha is 20 r too
        renamed = {"randlora_dropout": shared.pop("lora_dropout"), "randlora_alpha": 20 * r}
        return RandLoraConfig(**shared, **renamed)
    if name == "lora":
        return AtlasLoraConfig(**shared)
    if name == "pissa":
        return AtlasLoraConfig(init_weights="pissa", **svd, **shared)
    if name in ("srlora", "srlora-inplace"):
        mode = "inplace" if name == "srlora-inplace" else "difference"
        return SRLoraConfig(r_target=r + EVENTS * r // 2, gamma=0.5, fuse_mode=mode, **svd, **shared)
    system = trainable(name)
    known = {f.name for f in fields(load_entry(system))}
    if "init_r" in known:  # against a LoRA of the rank that its tensors have room for
        shared |= {"r": r // 4, "r_max": r}
    return build_config(system, "", model, {key: value for key, value in shared.items() if key in known})
