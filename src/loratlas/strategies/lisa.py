"""LISA: full-rank training of a few randomly chosen layers at a time (arXiv 2403.17919, official code read).

    period i = step // K:   S_i = gamma of the N blocks, uniform without replacement, from (seed, i) alone
    trains:                 everything outside the blocks, and the blocks in S_i; the others have no gradient

Embeddings and head move most under LoRA, and LISA lets them train always. Gradients are those of the active blocks
only. A frozen block's moments wait where they are ("keep", the official code), are forgotten ("drop") or wait on the
CPU ("offload"); only the last two keep the optimizer small for more than one period.

    Trainer(model, ..., callbacks=[LisaConfig().build()])
    LisaConfig().build().attach(model, optimizer)              # plain loop; nothing else changes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from loratlas.engine.config import knob
from loratlas.engine.distributed import torch_optimizer
from loratlas.engine.parts import StrategyConfig
from loratlas.errors import UserError
from loratlas.strategies.blocks import Partition, partition
from loratlas.strategies.footprint import Footprint, gradients_of, state_of, with_adam

KEPT = ("keep", "drop", "offload")


@dataclass
class LisaConfig(StrategyConfig):
    """Layer sampling. The model's own weights train; the result is a whole model.

    Raises:
        UserError: an option out of its range; in `check`, one that does not fit the model.
    """

    name: ClassVar[str] = "lisa"
    trains_base: ClassVar[bool] = True

    num_active_layers: int = knob(2, "gamma: how many blocks train at a time; more is better and costs memory.")
    interval_steps: int = knob(20, "K: optimizer steps between two choices.")
    layers_path: list[str] | str | None = knob(
        None, "Path of the list of blocks, or several; None: the largest list of layers in the model."
    )
    always_trainable: list[str] | None = knob(
        None,
        "Modules outside the blocks that train always; None: all (embeddings, final norm, head). []: the blocks alone, "
        "which leaves a new head untrained.",
    )
    optimizer_state: str = knob(
        "keep", "State of frozen blocks: 'keep' (official; it grows), 'drop' (forget it) or 'offload' (to the CPU)."
    )
    weights: list[float] | None = knob(None, "Relative chance of every block to be drawn next; None: all alike.")
    seed: int = knob(0, "Seed of the choice of blocks.")

    def __post_init__(self) -> None:
        self._require(self.num_active_layers >= 0, "num_active_layers", "at least 0")
        self._require(self.interval_steps >= 1, "interval_steps", "at least 1")
        self._require(self.optimizer_state in KEPT, "optimizer_state", f"one of {', '.join(KEPT)}")
        alone = self.num_active_layers > 0 or self.always_trainable != []
        self._require(alone, "num_active_layers", "at least 1 where always_trainable is empty")
        chances = self.weights
        usable = chances is None or (min(chances) >= 0 and sum(w > 0 for w in chances) >= self.num_active_layers)
        self._require(usable, "weights", f"numbers >= 0, {self.num_active_layers} or more of them above 0")

    def check(self, model: nn.Module) -> None:
        self.partition(model)

    def partition(self, model: nn.Module) -> Partition:
        """The blocks of `model` and the rest; raises as `check`."""
        found = partition(model, self.layers_path, self.always_trainable)
        count = len(found.blocks)
        self._require(self.num_active_layers <= count, "num_active_layers", f"at most {count}, the number of blocks")
        fits = self.weights is None or len(self.weights) == count
        self._require(fits, "weights", f"{count} numbers, one a block")
        return found

    def build(self) -> LisaCallback:
        return LisaCallback(self)

    def active(self, blocks: int, period: int) -> list[int]:
        """The blocks, of so many, that train in period `period`; the same on every rank and after a resume."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + period) % 2**63)
        if self.num_active_layers == 0:
            return []
        if self.weights is None:
            return sorted(torch.randperm(blocks, generator=generator)[: self.num_active_layers].tolist())
        chances = torch.tensor(self.weights, dtype=torch.float64)
        return sorted(torch.multinomial(chances, self.num_active_layers, generator=generator).tolist())


class LisaCallback(TrainerCallback):
    """Layer sampling in a Trainer, or after `attach` in a plain loop.

    Attributes:
        active: indices of the blocks that train now.
        peak: the largest footprint so far, measured in the first step of every period.
    """

    def __init__(self, cfg: LisaConfig | None = None) -> None:
        self.cfg = cfg or LisaConfig()
        self.active: list[int] = []
        self.peak = Footprint()
        self._parts: Partition | None = None
        self._period: int | None = None
        self._measured: int | None = None
        self._step = 0
        self._handles: list[Any] = []

    def attach(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int | None = None, *, step: int = 0
    ) -> LisaCallback:
        """Choose blocks now, and again after every K-th `optimizer.step`.

        Args:
            optimizer: built from all parameters that may train, before this.
            total_steps: not needed here; strategies take it.
            step: optimizer steps done before, for a run that goes on.

        Raises:
            UserError: an option that does not fit the model.
        """
        self._begin(model, optimizer, step)
        self._step = step
        self._handles.append(torch_optimizer(optimizer).register_step_post_hook(self._next))
        return self

    def detach(self) -> None:
        """Leave the optimizer alone and let all parameters require gradients again that did before."""
        for handle in self._handles:
            handle.remove()
        for p in self._parts.all() if self._parts else ():
            p.requires_grad_(True)
        self._handles, self._parts, self._period = [], None, None

    def forecast(self, model: nn.Module, total_steps: int) -> list[str]:
        """The peak that the choices of `total_steps` steps lead to with Adam, and that of full training."""
        parts = self.cfg.partition(model)
        everything = list(parts.all())
        return [
            f"LISA trains {self.cfg.num_active_layers} of {len(parts.blocks)} blocks at a time: with Adam at most "
            f"{self.predicted(parts, total_steps)}, where all weights would need {with_adam(everything, everything)}"
        ]

    def predicted(self, parts: Partition, total_steps: int) -> Footprint:
        """The largest footprint of a run with Adam."""
        peak, ever = Footprint(), set(parts.always)
        for period in range(-(-total_steps // self.cfg.interval_steps)):
            trained = parts.trained(self.cfg.active(len(parts.blocks), period))
            ever |= trained
            peak = peak.larger(with_adam(trained, ever if self.cfg.optimizer_state == "keep" else trained))
        return peak

    def remarks(self) -> list[str]:
        """The peak as it was measured."""
        return [f"LISA needed at most {self.peak}"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(kwargs["model"], kwargs["optimizer"], state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._choose(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    def _begin(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        self.detach()
        self._optimizer = torch_optimizer(optimizer)
        self._parts = self.cfg.partition(model)
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not all(id(p) in held for p in self._parts.all()):
            raise UserError(
                "LISA's optimizer does not hold all parameters that may train: build it from model.parameters() before "
                "the strategy begins."
            )
        if self._parts.never and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            inner: Any = model
            inner.enable_input_require_grads()  # reentrant checkpoints need an input that has a gradient
        self._handles = [
            self._optimizer.register_step_pre_hook(self._measure_gradients),
            self._optimizer.register_step_post_hook(self._measure_state),
        ]
        self._choose(step)

    def _choose(self, step: int) -> None:
        period = step // self.cfg.interval_steps
        if self._parts is None or period == self._period:
            return
        self._period, self.active = period, self.cfg.active(len(self._parts.blocks), period)
        trained = self._parts.trained(self.active)
        for p in self._parts.all():
            p.requires_grad_(p in trained)
            if p not in trained:
                p.grad = None  # a stale gradient would be applied by the next step
            self._treat_state(p, p in trained)

    def _treat_state(self, p: nn.Parameter, trains: bool) -> None:
        state = self._optimizer.state
        if self.cfg.optimizer_state == "drop" and not trains:
            state.pop(p, None)
        elif self.cfg.optimizer_state == "offload" and p in state:
            place = p.device if trains else torch.device("cpu")
            moved = {k: v.to(place) for k, v in state[p].items() if isinstance(v, Tensor) and v.dim()}
            state[p].update(moved)

    def _next(self, *_: Any) -> None:
        self._step += 1
        self._choose(self._step)

    def _measure_gradients(self, *_: Any) -> None:
        if self._measured != self._period:
            self.peak = self.peak.larger(Footprint(gradients=gradients_of(self._optimizer)))

    def _measure_state(self, *_: Any) -> None:
        if self._measured != self._period:
            self._measured = self._period
            self.peak = self.peak.larger(Footprint(optimizer=state_of(self._optimizer)))
