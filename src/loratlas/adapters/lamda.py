"""LaMDA and LaMDA++ (arXiv 2406.12832): a trained core, and an up projection that freezes column by column.

    W' = W + s (B N A - B0 N0 A),      A = V_r^T fixed,   B0 = U_r,   N0 = diag(S_r) / s   of W = U S V^T

    step j of T:   the first k = min(r, floor(r j / (eta T))) columns of B no longer move

r out + r^2 parameters train at first and r^2 after eta T steps, when B has stopped and the optimizer has let go of its
state. The columns of the largest singular values stop first. As A is fixed, the backward pass does not need the input
of the layer. LaMDA++ (rank_allocation="spectrum") gives flat spectra more rank and concentrated ones less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas.engine import cores
from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.cores import CoreMethod
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import local
from loratlas.errors import UserError
from loratlas.linalg.factorise import usable_svd
from loratlas.linalg.spectrum import energy, spread_ranks


class Lamda(CoreMethod):
    """Beside the factors: frozen (r,), which columns of B the current step leaves where they are."""

    name = "lamda"
    params = ("N", "B")
    buffers = ("A", "N0", "B0", "frozen")

    def keeps_start(self, cfg: LamdaConfig) -> bool:
        return cfg.init_weights != "code"

    def shapes(self, cfg: LamdaConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(cfg, r, n_in, n_out), "frozen": (r,)}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"frozen": torch.bool}

    def ranks(self, cfg: LamdaConfig, weights: Mapping[str, Callable[[], Tensor]]) -> dict[str, int]:
        if cfg.rank_allocation is None:
            return {}
        energies = [energy(weight(), cfg.r, **cfg.svd_options()) for weight in weights.values()]
        return dict(zip(weights, spread_ranks(energies, *cfg.rank_range()), strict=True))

    def place(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        if t.cfg.init_weights == "code":
            cores.random_start(t, identity=True)
            return None
        u, s, vh = usable_svd(weight(), t.r, **t.cfg.svd_options())
        if len(s) < t.r:
            return len(s)
        cores.start(t, u, torch.diag(s / t.scaling), vh)
        return None

    def live_up(self, t: View) -> Tensor:
        # no gradient for frozen columns, rather than one that is dropped later: the clipped norm must not see it
        return torch.where(t.frozen, t.B.detach(), t.B) if t.B.requires_grad else t.B

    # -------------------------------------------------------------------------------------------------- training

    def columns(self, t: View, step: int, total: int) -> int:
        """k, the number of columns that are frozen from step `step` of `total` on, at most r."""
        span = t.cfg.freeze_fraction * total
        if span == 0.0:
            return t.r
        return min(t.r, math.floor((step if t.cfg.freeze_schedule == "code" else t.r * step) / span))

    def masked(self, t: View, step: int, total: int) -> int:
        """Columns without a gradient in step `step`: k, but the official code forgets them in the step that stops B."""
        k = self.columns(t, step, total)
        stops = t.cfg.freeze_schedule == "code" and k == t.r > self.columns(t, step - 1, total)
        return 0 if stops else k

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        if views[0].cfg.freeze_fraction > 0.0 and not ctx.total_steps:
            raise UserError(
                "LaMDA freezes B over a fraction of the whole run: pass attach(..., total_steps=N) or use a Trainer."
            )

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        ctx.scratch[self] = []
        for t in (t for t in views if t.B.grad is not None):
            k = self.masked(t, ctx.step, ctx.total_steps)
            if k == t.r:
                t.B.grad = None  # a gradient of zeros would give it optimizer state again
                continue
            local(t.B.grad)[:, :k] = 0  # for the first step; later ones have `frozen`
            if t.cfg.freeze_schedule == "linear":
                columns = local(t.B)[:, :k]
                ctx.scratch[self].append((columns, columns.clone()))

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        for columns, before in ctx.scratch[self]:
            columns.copy_(before)  # against momentum and weight decay
        for t in (t for t in views if t.B.requires_grad):
            if self.columns(t, ctx.step, ctx.total_steps) == t.r:
                self.stop(t, ctx)
                continue
            k = self.masked(t, ctx.step + 1, ctx.total_steps)
            if k != self.masked(t, ctx.step, ctx.total_steps) or ctx.step == 1:
                t.frozen.copy_(torch.arange(t.r) < k)

    def stop(self, t: View, ctx: StepContext) -> None:
        """B is done: no gradient, no optimizer state. It stays in its parameter group, or nothing could be resumed."""
        t.frozen.fill_(True)
        ctx.optimizer.state.pop(t.B, None)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            t.B.requires_grad_(False)  # DistributedDataParallel would wait for its gradient


@adapter(Lamda())
@dataclass
class LamdaConfig(SvdConfig):
    """LaMDA. Training needs `loratlas.attach(model, optimizer, total_steps=N)` or `LifecycleCallback` in a Trainer.

    Raises:
        UserError: a field is out of its range.
    """

    init_weights: bool | str = knob(
        True,
        "True: principal directions of W, taken out of the update. 'code': as in the official code, A and N random and "
        "B zero. False: all random (for tests).",
    )
    freeze_fraction: float = knob(0.3, "eta: the fraction of the run after which B is fully frozen; 0: from the start.")
    freeze_schedule: str = knob(
        "linear",
        "'linear': all r columns freeze within the fraction. 'code': as the official code, one column every eta T "
        "steps, by gradient alone, so that momentum and weight decay still move them.",
    )
    rank_allocation: str | None = knob(None, "'spectrum': LaMDA++, ranks from r_min to r_max by layer. None: r.")
    r_min: int | None = knob(None, "Least rank of LaMDA++; None: r / 2.")
    r_max: int | None = knob(None, "Largest rank of LaMDA++; None: 2 r - r_min, which keeps the mean at r.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.init_weights in (True, False, "code"), "init_weights", "True, False or 'code'")
        self._require(0.0 <= self.freeze_fraction <= 1.0, "freeze_fraction", "in [0, 1]")
        self._require(self.freeze_schedule in ("linear", "code"), "freeze_schedule", "'linear' or 'code'")
        self._require(self.rank_allocation in (None, "spectrum"), "rank_allocation", "None or 'spectrum'")
        for name in ("r_min", "r_max"):
            unused = self.rank_allocation is None and getattr(self, name) is not None
            self._require(not unused, name, "left out without rank_allocation='spectrum'")
        low, high = self.rank_range()
        self._require(1 <= low <= self.r, "r_min", f"between 1 and r={self.r}")
        self._require(high == 2 * self.r - low, "r_max", f"2 r - r_min = {2 * self.r - low}, which keeps the mean at r")

    def rank_range(self) -> tuple[int, int]:
        """(r_min, r_max) with their defaults."""
        low = (self.r + 1) // 2 if self.r_min is None else self.r_min
        return low, 2 * self.r - low if self.r_max is None else self.r_max
