"""What a run can have beside its adapter: an optimizer, an objective, a strategy. Each is a small dataclass of options
that makes the thing itself, so that the catalogue, the command line and recipes treat all alike.

    @dataclass
    class MyOptimizerConfig(OptimizerConfig):
        rank: int = knob(128, "Rank of the projection.")
        def build(self, model, lr, weight_decay=0.0): return MyOptimizer(...)

The things are ordinary: a `torch.optim.Optimizer`, a function of a batch, a `TrainerCallback`. They work in plain loops
and in transformers' Trainer without this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from loratlas.errors import UserError


@dataclass
class Part:
    """Options of an optimizer, an objective or a strategy.

    Attributes:
        name: slug in the catalogue.
        trains_base: the base model's own weights train, without an adapter.
        needs_pairs: it works on low-rank pairs, so the model must have an adapter that has them.
    """

    name: ClassVar[str]
    trains_base: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False

    def check(self, model: nn.Module) -> None:
        """Raise `UserError` if it cannot work with `model`; called before anything trains."""

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise UserError(f"{type(self).__name__}: {name} must be {what}, but it is {value!r}.", field=name)


@dataclass
class OptimizerConfig(Part):
    """Makes a torch optimizer over the parameters of a model that require gradients."""

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> Optimizer:
        """The optimizer with its parameter groups, whose base rates for schedulers are `lr` or multiples of it."""
        raise NotImplementedError


class Objective:
    """The loss of a training batch; evaluation keeps the model's own.

        for step in range(total):
            objective.at(step, total)
            for batch in micro_batches:
                (objective.loss(model, batch) / len(micro_batches)).backward()
            optimizer.step(); optimizer.zero_grad()

    The loss is a mean over the batch, so micro-batches are averaged and transformers' `num_items_in_batch` stays out.
    Nothing has to be saved: all that a schedule follows is the step that it is told.

    Attributes:
        own: keys of a batch that are for the objective and not for the model's forward.
        terms: the unweighted parts of the last loss by name, detached scalars, for logs.
    """

    own: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}

    def at(self, step: int, total: int) -> None:
        """Optional hook: the next batches belong to optimizer step `step` of `total`, counted from 0.

        Called before every step, after a resume with the step that comes next (Trainer's `state.global_step`). An
        objective without a schedule ignores it.
        """

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The loss, a scalar. inputs: the whole batch; outputs: what `model` made of it without the keys in `own`.

        `outputs.loss` is the task's own loss, so the model must see the labels. `model` may be wrapped (DDP).
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """(loss, outputs) of one batch: runs the model on what is the model's, then itself."""
        outputs = model(**{name: value for name, value in batch.items() if name not in self.own})
        return self(model, batch, outputs), outputs

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of one batch, model forward included: all that a plain loop needs."""
        return self.forward(model, batch)[0]


@dataclass
class ObjectiveConfig(Part):
    """Makes a loss that replaces or extends the model's own.

    Attributes:
        sets: names of sets of rows that it needs beside the training rows, such as "forget". A batch then holds as many
            rows of the set, and under its name one boolean a row that says which they are.
    """

    sets: ClassVar[tuple[str, ...]] = ()

    def build(self, model: nn.Module) -> Objective:
        """The objective for `model`, with its adapter if it has one, before anything wraps it."""
        raise NotImplementedError


@dataclass
class StrategyConfig(Part):
    """Makes a `TrainerCallback` that decides what trains when; it has `attach` for plain loops."""

    def build(self) -> Any:
        """A TrainerCallback with `attach(model, optimizer, total_steps)` and `detach()`.

        In a plain loop `attach` registers what it needs as hooks of `optimizer.step`, as `lifecycle.attach` does.
        Where it has them, `forecast(model, total_steps)` and `remarks()` give sentences for the user, before and after
        training.
        """
        raise NotImplementedError
