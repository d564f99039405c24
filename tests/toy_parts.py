"""An optimizer, an objective and a strategy of a few lines each, in the catalogue while a test runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from loratlas import UserError, catalog
from loratlas.catalog import System
from loratlas.engine.config import knob
from loratlas.engine.parts import Objective, ObjectiveConfig, OptimizerConfig, StrategyConfig

ROWS = {  # slug: (kind, class)
    "toy-heavy": ("optimizer", "HeavyConfig"),
    "toy-pairs": ("optimizer", "PairsConfig"),
    "toy-scaled": ("objective", "ScaledConfig"),
    "toy-first": ("strategy", "FirstConfig"),
}


@contextmanager
def catalogued() -> Iterator[None]:
    """The toys as rows of the catalogue."""
    rows = catalog._load()["systems"]
    for slug, (kind, name) in ROWS.items():
        rows[slug] = System(slug, slug.title(), "2000.00000", kind, "A toy.", ("none",), entry=f"toy_parts:{name}")
    rows["toy-planned"] = System("toy-planned", "Planned", "2000.00000", "objective", "A toy.", ("none",))
    try:
        yield
    finally:
        for slug in (*ROWS, "toy-planned"):
            del rows[slug]


@dataclass
class HeavyConfig(OptimizerConfig):
    """Gradient descent with momentum."""

    name: ClassVar[str] = "toy-heavy"
    trains_base: ClassVar[bool] = True

    momentum: float = knob(0.9, "Share of the last step in the next.")

    def __post_init__(self) -> None:
        self._require(0 <= self.momentum < 1, "momentum", "in [0, 1)")

    def check(self, model: nn.Module) -> None:
        if any(p.requires_grad and p.dim() == 7 for p in model.parameters()):
            raise UserError("toy-heavy has no use for tensors of seven dimensions.")

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr, momentum=self.momentum, weight_decay=weight_decay)


@dataclass
class PairsConfig(HeavyConfig):
    """As `HeavyConfig`, for pairs only."""

    name: ClassVar[str] = "toy-pairs"
    trains_base: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = True


class Scaled(Objective):
    """`told`: the steps that it was told, each as (step, total)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.told: list[tuple[int, int]] = []

    def at(self, step: int, total: int) -> None:
        self.told.append((step, total))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        return self.factor * outputs.loss


@dataclass
class ScaledConfig(ObjectiveConfig):
    """The task's loss times a factor."""

    name: ClassVar[str] = "toy-scaled"

    factor: float = knob(3.0, "The factor.")

    def build(self, model: nn.Module) -> Scaled:
        return Scaled(self.factor)


class First(TrainerCallback):
    """Trains the first half of the parameters only; frozen as soon as training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = list(kwargs["model"].parameters())
        for p in parameters[len(parameters) // 2 :]:
            p.requires_grad_(False)

    def forecast(self, model: nn.Module, total_steps: int) -> list[str]:
        return [f"the first half of {len(list(model.parameters()))} tensors trains"]

    def remarks(self) -> list[str]:
        return ["the first half has trained"]


@dataclass
class FirstConfig(StrategyConfig):
    name: ClassVar[str] = "toy-first"
    trains_base: ClassVar[bool] = True

    def build(self) -> First:
        return First()
