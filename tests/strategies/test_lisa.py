"""LISA: which blocks train when, what becomes of the others' gradients and moments, and what memory that takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from loratlas import AtlasLoraConfig, LisaCallback, LisaConfig, UserError
from loratlas.strategies.blocks import find_blocks
from loratlas.strategies.footprint import Footprint, state_of
from loratlas.train.atomic import AtomicCheckpoints

VOCAB, WIDTH, DEPTH = 20, 16, 5
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": VOCAB}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=DEPTH, num_key_value_heads=2, **SIZES))


def tokens(count: int = 4, seed: int = 1) -> Tensor:
    """Texts that count upwards from a random start."""
    starts = torch.randint(0, VOCAB, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(8)) % VOCAB


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    each: Callable[[int], None] = lambda step: None,
    batches: int = 1,
    begin: int = 0,
) -> list[float]:
    """Losses of `steps` steps; `each(step)` runs between backward and the optimizer's step."""
    losses = []
    for step in range(begin, begin + steps):
        for part in range(batches):
            ids = tokens(seed=step * batches + part)
            loss = model(input_ids=ids, labels=ids).loss / batches
            loss.backward()
        losses.append(float(loss.detach()))
        each(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def training(model: nn.Module) -> list[int]:
    """Indices of the blocks that require gradients."""
    blocks = list(find_blocks(model).values())
    return [index for index, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_exactly_the_active_blocks_train_and_change_only_at_the_interval() -> None:
    model, seen = llama(), []
    optimizer = adam(model)
    lisa = LisaConfig(interval_steps=3, seed=4).build().attach(model, optimizer)

    def look(step: int) -> None:
        assert training(model) == lisa.active
        for index, block in enumerate(model.model.layers):
            assert all((p.grad is not None) == (index in lisa.active) for p in block.parameters())
        outside = (model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight)
        assert all(p.grad is not None for p in outside)
        seen.append(tuple(lisa.active))

    train(model, optimizer, 12, look, batches=2)
    assert [len(set(active)) for active in seen] == [2] * 12
    assert all(seen[i] == seen[i - i % 3] for i in range(12))
    assert seen[::3] == [tuple(lisa.cfg.active(DEPTH, period)) for period in range(4)]
    assert len(set(seen)) > 1
    lisa.detach()
    assert training(model) == list(range(DEPTH))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 1.0, 1.0]], ids=["uniform", "weighted"])
def test_blocks_are_drawn_as_often_as_they_should(weights: list[float] | None) -> None:
    cfg = LisaConfig(num_active_layers=1 if weights else 2, weights=weights)
    periods = 2000
    drawn = torch.tensor([index for period in range(periods) for index in cfg.active(DEPTH, period)])
    counts = torch.bincount(drawn, minlength=DEPTH).double()
    shares = torch.tensor(weights or [1.0] * DEPTH, dtype=torch.float64)
    expected = shares / shares.sum() * len(drawn)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], expected[possible]).pvalue > 0.01
    assert cfg.active(DEPTH, 7) == LisaConfig(**vars(cfg)).active(DEPTH, 7)


def test_all_blocks_at_once_are_full_training() -> None:
    full, sampled = llama(), llama()
    optimizers = [adam(full), adam(sampled)]
    LisaConfig(num_active_layers=DEPTH, interval_steps=2).build().attach(sampled, optimizers[1])
    train(full, optimizers[0], 6)
    train(sampled, optimizers[1], 6)
    assert same(full, sampled)


def test_what_lies_outside_can_be_kept_or_left_alone() -> None:
    start, model = llama(), llama()
    optimizer = adam(model)
    LisaConfig(num_active_layers=0).build().attach(model, optimizer)
    train(model, optimizer, 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}

    model = llama()
    optimizer = adam(model)
    lisa = LisaConfig(num_active_layers=1, always_trainable=["lm_head"], interval_steps=9).build()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    lisa.attach(model, optimizer)
    train(model.train(), optimizer, 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    block = f"model.layers.{lisa.active[0]}."
    assert moved == {"lm_head.weight"} | {name for name, _ in model.named_parameters() if name.startswith(block)}


def test_parameters_that_the_user_froze_stay_frozen() -> None:
    model = llama()
    frozen = [layer.mlp.up_proj.weight for layer in model.model.layers]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = adam(model)
    lisa = LisaConfig(num_active_layers=DEPTH).build().attach(model, optimizer)
    assert not any(p.requires_grad for p in frozen)
    lisa.detach()
    assert not any(p.requires_grad for p in frozen)
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad


def test_dropped_state_is_that_of_frozen_blocks_and_offloaded_state_changes_nothing() -> None:
    models = {how: llama() for how in ("keep", "drop", "offload")}
    sizes: dict[str, list[int]] = {}
    for how, model in models.items():
        optimizer = adam(model)
        lisa = LisaConfig(interval_steps=2, optimizer_state=how).build().attach(model, optimizer)
        sizes[how] = []

        def look(step: int, how: str = how, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            sizes[how].append(state_of(optimizer))
            if how == "drop" and step:
                assert all(p.requires_grad for p in optimizer.state)

        train(model, optimizer, 12, look)
        assert lisa.peak.optimizer >= max(sizes[how])
    assert same(models["keep"], models["offload"])
    assert not same(models["keep"], models["drop"])
    assert sizes["keep"] == sorted(sizes["keep"])
    assert sizes["drop"][-1] < sizes["keep"][-1]


@pytest.mark.parametrize("how", ["keep", "drop"])
def test_the_forecast_is_what_is_measured_and_less_than_full_training(how: str) -> None:
    model = llama()
    optimizer = adam(model)
    lisa = LisaConfig(num_active_layers=1, interval_steps=2, optimizer_state=how).build()
    parts = lisa.cfg.partition(model)
    text = lisa.forecast(model, 6)[0]
    lisa.attach(model, optimizer)
    train(model, optimizer, 6)
    assert lisa.peak == lisa.predicted(parts, 6)
    assert str(lisa.peak) in text
    assert lisa.remarks() == [f"LISA needed at most {lisa.peak}"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert lisa.peak.gradients < weights
    assert lisa.peak.optimizer < 2 * weights
    assert str(Footprint(weights, 2 * weights)) in text


class Whole(AtomicCheckpoints, Trainer):
    pass


@pytest.mark.parametrize("how", ["keep", "drop", "offload"])
def test_a_resumed_trainer_ends_where_the_uninterrupted_one_does(how: str, tmp_path: Path) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> tuple[nn.Module, LisaCallback, list[list[int]]]:
        set_seed(0)
        lisa = LisaConfig(interval_steps=4, optimizer_state=how).build()
        active: list[list[int]] = []
        model = llama()
        model.register_forward_hook(lambda *_: active.append(training(model)))
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=6,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
        trainer = Whole(model, arguments, train_dataset=rows, callbacks=[lisa, *([Stop(6)] if steps == 6 else [])])
        trainer.train(resume_from_checkpoint=resume)
        return model, lisa, active

    whole, _, seen = run("a", 8)
    run("b", 6)
    resumed, lisa, later = run("b", 8, resume=True)
    assert same(whole, resumed)
    assert later == seen[12:]
    assert [len(active) for active in seen] == [2] * 16
    assert seen[:8] == [seen[0]] * 8
    assert seen[8:] == [lisa.cfg.active(DEPTH, 1)] * 8
    assert training(resumed) == list(range(DEPTH))


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def test_a_plain_loop_goes_on_at_its_step() -> None:
    whole, model = llama(), llama()
    optimizers = [adam(whole), adam(model)]
    cfg = LisaConfig(interval_steps=3, optimizer_state="drop")
    cfg.build().attach(whole, optimizers[0])
    train(whole, optimizers[0], 8)
    first = cfg.build().attach(model, optimizers[1])
    train(model, optimizers[1], 5)
    first.detach()
    cfg.build().attach(model, optimizers[1], step=5)
    train(model, optimizers[1], 3, begin=5)
    assert same(whole, model)


def test_it_learns_as_well_as_lora_with_less_memory_than_full_training() -> None:
    from peft import get_peft_model

    model, other = llama(), get_peft_model(llama(), AtlasLoraConfig(r=8, target_modules="all-linear"))
    optimizer = adam(model, 5e-3)
    lisa = LisaConfig(interval_steps=5, optimizer_state="drop").build().attach(model, optimizer)
    ours = train(model, optimizer, 40)
    theirs = train(other, adam(other, 5e-3), 40)
    assert sum(ours[-5:]) <= sum(theirs[-5:])
    assert lisa.peak.optimizer < 2 * sum(p.numel() * p.element_size() for p in model.parameters())


def test_blocks_of_models() -> None:
    small = {"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": VOCAB}
    assert list(find_blocks(GPT2LMHeadModel(GPT2Config(**small)))) == [f"transformer.h.{i}" for i in range(3)]
    bert = BertForSequenceClassification(BertConfig(num_hidden_layers=2, **SIZES))
    assert list(find_blocks(bert)) == [f"bert.encoder.layer.{i}" for i in range(2)]
    assert next(iter(find_blocks(nn.Sequential(llama()), "model.layers"))) == "0.model.layers.0"
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=24, num_heads=2, num_layers=2, vocab_size=VOCAB))
    with pytest.raises(UserError, match=r"decoder\.block and encoder\.block: name one or both in layers_path"):
        find_blocks(t5)
    assert len(find_blocks(t5, ["encoder.block", "decoder.block"])) == 4
    with pytest.raises(UserError, match=r"names no list of layers; there are encoder\.block"):
        find_blocks(t5, "layers")
    with pytest.raises(UserError, match=r"fits encoder\.block, decoder\.block: give the path of one"):
        find_blocks(t5, "block")
    with pytest.raises(UserError, match="Linear has no list of layers"):
        find_blocks(nn.Linear(2, 2))
    experts = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(9, 9)] * 4)}) for _ in range(2))
    assert list(find_blocks(nn.Sequential(experts))) == ["0.0", "0.1"]


WRONG = {
    "num_active_layers": ({"num_active_layers": DEPTH + 1}, f"must be at most {DEPTH}, the number of blocks"),
    "interval": ({"interval_steps": 0}, "interval_steps must be at least 1"),
    "state": ({"optimizer_state": "gone"}, "one of keep, drop, offload"),
    "nothing": ({"num_active_layers": 0, "always_trainable": []}, "where always_trainable is empty"),
    "weights": ({"weights": [1.0, 1.0]}, f"weights must be {DEPTH} numbers, one a block"),
    "chances": ({"weights": [1.0, 0.0, 0.0, 0.0, 0.0]}, "2 or more of them above 0"),
    "outside": ({"always_trainable": ["pooler"]}, "always_trainable names 'pooler', which is no module outside"),
    "path": ({"layers_path": "encoder"}, "layers_path 'encoder' names no list of layers; there are model.layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        LisaConfig(**options).check(llama())


def test_an_optimizer_of_fewer_parameters_is_refused() -> None:
    model = llama()
    with pytest.raises(UserError, match="does not hold all parameters that may train"):
        LisaConfig().build().attach(model, torch.optim.AdamW(model.lm_head.parameters()))


def test_tied_embeddings_train_always() -> None:
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True, **SIZES))
    lisa = LisaConfig(num_active_layers=1).build().attach(model, adam(model))
    ids = tokens()
    F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.grad is not None
    assert len(lisa.active) == 1
