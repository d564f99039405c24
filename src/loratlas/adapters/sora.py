"""SoRA (arXiv 2311.11696): LoRA whose pairs have gates, which a proximal step closes where they are not needed.

    y = x W^T + s ((x A^T) * g) B^T,      s = alpha / r,     A (r, in), B (out, r), g (r,)

    loss:              L + sparse_lambda * mean |g| over all gates
    after every step:  g <- T_xi(g)       (see `engine.gates`)

What is left open of the r pairs is the layer's rank. With a schedule, xi rises from stage to stage of one run, which
traces quality against rank (the paper's algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratlas.engine.config import knob
from loratlas.engine.gates import GatedConfig, GatedMethod, sparsity_loss
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View
from loratlas.engine.phases import Phases
from loratlas.engine.registry import adapter
from loratlas.errors import UserError

# a named schedule is evenly spaced on this axis: (to the axis, back)
_AXES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (float, float),
    "log_linear": (math.exp, math.log),
    "exp_linear": (math.log, math.exp),
}
_CURVES = {"restart": "each", "official": "first"}


class SoRA(GatedMethod):
    """The stage, and so the threshold, follows from the step alone: there is nothing to remember but the gates."""

    name = "sora"

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        if len(views[0].cfg.thresholds()) > 1 and not ctx.total_steps:
            raise UserError(
                "SoRA's xi_schedule divides the whole run into stages: pass attach(..., total_steps=N) or use a "
                "Trainer."
            )

    def phases(self, cfg: SoRAConfig, total_steps: int) -> Phases:
        return Phases.split(total_steps, len(cfg.thresholds()), cfg.first_stage)

    def pace(self, views: Sequence[View], ctx: StepContext, scheduler: Any) -> None:
        cfg = views[0].cfg
        if len(cfg.thresholds()) > 1 and cfg.stage_lr in _CURVES:
            self.phases(cfg, ctx.total_steps).pace(scheduler, _CURVES[cfg.stage_lr])

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        cfg = views[0].cfg
        self.shrink(views, ctx, cfg.thresholds()[self.phases(cfg, ctx.total_steps).at(ctx.step)])

    def adds_loss(self, cfg: SoRAConfig) -> bool:
        return cfg.sparse_lambda > 0.0

    def extra_loss(self, views: Sequence[View]) -> Tensor:
        return views[0].cfg.sparse_lambda * sparsity_loss(views)


@adapter(SoRA())
@dataclass
class SoRAConfig(GatedConfig):
    """SoRA. Training needs `loratlas.attach(model, optimizer)` or `LifecycleCallback` in a Trainer.

    r is the most a layer can keep. A gate that nothing pulls at shrinks by xi a step, so choose xi times the number of
    steps near 1.

    Raises:
        UserError: a field is out of its range.
    """

    lora_alpha: float | None = knob(16, "Numerator of the scaling alpha / r, which does not move when pairs die.")
    sparse_lambda: float = knob(1e-3, "Weight of the mean |gate| in the loss; 0: no such term.")
    xi: float = knob(1e-3, "Threshold after every step, absolute; the first stage's where there is a schedule.")
    xi_schedule: str | list[float] | None = knob(
        None,
        "Stages with a threshold each: 'linear', 'log_linear' or 'exp_linear' from xi to xi_max, or the list itself.",
    )
    xi_max: float = knob(7e-4, "Threshold of the last stage of a named schedule.")
    stages: int = knob(7, "Number of stages of a named schedule.")
    first_stage: float | None = knob(None, "Share of the run for the first stage; None: all are equally long.")
    stage_lr: str = knob(
        "restart",
        "Learning rate of stages: 'restart' its schedule in each; 'official': the schedule ends with the first stage "
        "and later ones keep its last rate, usually 0; 'run': one schedule for all.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        named = isinstance(self.xi_schedule, str)
        for name in ("sparse_lambda", "xi", "xi_max"):
            self._require(getattr(self, name) >= 0.0, name, "at least 0")
        if named:
            self._require(self.xi_schedule in _AXES, "xi_schedule", f"one of {', '.join(_AXES)}, or a list")
            self._require(self.stages >= 1, "stages", "at least 1")
            self._require(self.xi > 0.0 or self.xi_schedule != "exp_linear", "xi", "above 0 with 'exp_linear'")
            self._require(self.xi <= self.xi_max, "xi", f"at most xi_max={self.xi_max}, as thresholds of stages rise")
        elif self.xi_schedule is not None:
            right = bool(self.xi_schedule) and all(xi >= 0.0 for xi in self.xi_schedule)  # type: ignore[operator]
            self._require(right, "xi_schedule", "a list of thresholds of at least 0")
        share = self.first_stage
        self._require(share is None or 0.0 < share < 1.0, "first_stage", "between 0 and 1")
        self._require(self.stage_lr in (*_CURVES, "run"), "stage_lr", "'restart', 'official' or 'run'")

    def thresholds(self) -> tuple[float, ...]:
        """xi of every stage; one without a schedule."""
        if self.xi_schedule is None:
            return (self.xi,)
        if not isinstance(self.xi_schedule, str):
            return tuple(self.xi_schedule)
        there, back = _AXES[self.xi_schedule]
        points = torch.linspace(there(self.xi), there(self.xi_max), self.stages, dtype=torch.float64)
        return tuple(map(back, points.tolist()))
