"""Events as soon as a layer's lowest scores have settled, by a plan at the latest.

Every few steps the mean score m of the pairs that would go, over the mean of their layer's, is compared with what it
was for the same pairs at the look before:

    |m - m'| <= tolerance * m

A ratio, because all scores grow together: with the gradients, and as moving averages that have begun at 0.

Tensors: seen (r,) those ratios at the last look, 0 if there was none since an event; due (), int64, the step after
which the next event comes, 0 if none does. The host knows `due` and the number of events done from the looks, at which
the answers of all layers are read in one go, so that no other step waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratlas.engine.events import Expected
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View

BUFFERS = ("seen", "due")


def shapes(r: int) -> dict[str, tuple[int, ...]]:
    return {"seen": (r,), "due": ()}


def begin(views: Sequence[View], plans: Sequence[range], ctx: StepContext) -> None:
    """Learn where the layers stand; `plans` are the steps by which each layer has its events at the latest."""
    for t, plan in zip(views, plans, strict=True):
        done = int(t.events)
        _expect(t, Expected(done, int(t.due)) if ctx.step else _planned(plan, done), ctx)
        if ctx.step == 0:
            t.seen.zero_()


def expected(t: View, ctx: StepContext) -> Expected:
    """The layer's next event, as the host knows it."""
    found: Expected = ctx.memo[t.layer]
    return found


def passed(t: View, plan: range, ctx: StepContext) -> None:
    """Call at an event: the next one comes by the plan, unless scores settle before."""
    _expect(t, _planned(plan, expected(t, ctx).number + 1), ctx)
    t.seen.zero_()


def look(views: Sequence[View], scores: Sequence[Tensor], counts: Sequence[int], wait: int, ctx: StepContext) -> None:
    """Where scores have settled, let the event come `wait` steps from now, or by the plan if that is sooner.

    Args:
        scores: (r,) of each layer. counts: how many of its pairs go at an event.
    """
    tolerance = views[0].cfg.settle_tolerance
    shares = [own / own.mean().clamp_min(torch.finfo(own.dtype).tiny) for own in scores]
    settled = [_settled(t.seen, now, count, tolerance) for t, now, count in zip(views, shares, counts, strict=True)]
    for t, now in zip(views, shares, strict=True):
        t.seen.copy_(now)
    answers: list[bool] = ctx.agree(torch.stack(settled)).tolist()
    for t, answer in zip(views, answers, strict=True):
        number, step = expected(t, ctx)
        if answer and ctx.step + wait < step:
            _expect(t, Expected(number, ctx.step + wait), ctx)


def _settled(seen: Tensor, now: Tensor, count: int, tolerance: float) -> Tensor:
    low = now.argsort(stable=True)[:count]
    before, after = seen[low].mean(), now[low].mean()
    return (before > 0) & ((after - before).abs() <= tolerance * after)


def _planned(plan: range, number: int) -> Expected:
    return Expected(number, plan[number] if number < len(plan) else 0)


def _expect(t: View, event: Expected, ctx: StepContext) -> None:
    ctx.memo[t.layer] = event
    t.due.fill_(event.step)
