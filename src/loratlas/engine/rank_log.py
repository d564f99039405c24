"""How the rank of a layer moved: a growing buffer rank_log (k, 2) of [optimizer step, rank from that step on].

An entry of step 0 begins a plan; a method that starts again, as for another task, has several.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View

LOG = "rank_log"
POINTS = 50  # looks at the ranks in a run, where looking means waiting for the device


def due(ctx: StepContext) -> bool:
    """Whether the current step is one of some `POINTS` over the run, or its last one."""
    interval = max(1, ctx.total_steps // POINTS) if ctx.total_steps else POINTS
    return ctx.step % interval == 0 or ctx.step == ctx.total_steps


def note(t: View, step: int, rank: int) -> None:
    """Write down that `t` has `rank` from `step` on, if that is news."""
    log = t.rank_log
    if step == 0 or len(log) == 0 or int(log[-1, 1]) != rank:
        t.grow(LOG, torch.cat((log, torch.tensor([[step, rank]], dtype=log.dtype, device=log.device))))


def note_all(views: Iterable[View], step: int, ranks: Tensor) -> None:
    """`note` for all layers; ranks (layers,) comes from the device in one piece."""
    for t, rank in zip(views, ranks.tolist(), strict=True):
        note(t, step, rank)
