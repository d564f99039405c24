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
from typing import Any, ClassVar, Protocol

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
        """The optimizer with its parameter groups; schedulers see `lr` as every group's base rate."""
        raise NotImplementedError


class Objective(Protocol):
    """The loss of a batch. Modules of its own (none as a rule) and what it must remember are its own business."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The loss (a scalar) from what the model made of `inputs`; outputs.loss is the task's own loss."""
        ...


@dataclass
class ObjectiveConfig(Part):
    """Makes a loss that replaces or extends the model's own."""

    def build(self, model: nn.Module) -> Objective:
        raise NotImplementedError


@dataclass
class StrategyConfig(Part):
    """Makes a `TrainerCallback` that decides what trains when; it has `attach` for plain loops."""

    def build(self) -> Any:
        """A TrainerCallback with `attach(model, optimizer, total_steps)` and `detach()`.

        In a plain loop `attach` registers what it needs as hooks of `optimizer.step`, as `lifecycle.attach` does.
        """
        raise NotImplementedError
