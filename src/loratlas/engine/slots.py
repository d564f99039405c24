"""Slots for rank-one pairs that come to life while training.

Tensors have room for r_max pairs from the start, so that no parameter ever changes shape or identity: optimizers, DDP
buckets, FSDP2 shards and compiled graphs stay valid. Which slots are in use is a count in a buffer:

    rank (), int64: slots 0 .. rank - 1 are alive        born (r_max,), int64: the step at which a slot came to life

A slot that is not alive is multiplied by 0, so its parameters have no gradient and Adam, whose moments then stay 0,
leaves them where they are. What a new slot starts from is drawn when it is needed, from a generator of (seed, step).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratlas.engine import rank_log
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View
from loratlas.engine.sharded import put_

BUFFERS = ("rank", "born", "rank_log")
INTEGERS = dict.fromkeys(BUFFERS, torch.int64)


def shapes(r_max: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the buffers; rank_log grows, see `engine.rank_log`."""
    return {"rank": (), "born": (r_max,), "rank_log": (0, 2)}


def alive(t: View, reserve: int = 0) -> Tensor:
    """(r_max,) 1 for slots that are alive, and for the next `reserve` ones, else 0; in the adapter's dtype."""
    return (torch.arange(len(t.born), device=t.rank.device) < t.rank + reserve).to(t.A.dtype)


def start(t: View, rank: int) -> None:
    """Let the layer begin with `rank` live slots."""
    t.rank.fill_(rank)
    note(t, 0)


def note(t: View, step: int) -> None:
    """Write the layer's rank into its log if it has changed, or if the log is empty."""
    rank_log.note(t, step, int(t.rank))


def wake(t: View, count: int, ctx: StepContext) -> Tensor:
    """Bring the next `count` slots to life; returns their indices (count,)."""
    slots = torch.arange(int(t.rank), int(t.rank) + count, device=t.rank.device)
    t.rank.add_(count)
    t.born[slots] = ctx.step
    note(t, ctx.step)
    return slots


def fill(param: Tensor, dim: int, slots: Tensor, std: float, generator: torch.Generator) -> None:
    """Start the slices `slots` of `param` along `dim` at N(0, std^2), drawn on the CPU in fp32."""
    shape = list(param.shape)
    shape[dim] = len(slots)
    put_(param, dim, slots, torch.randn(shape, generator=generator).mul_(std).to(slots.device, param.dtype))


def clear(param: Tensor, dim: int, slots: Tensor) -> None:
    """Set the slices `slots` of `param` along `dim` to zero."""
    shape = list(param.shape)
    shape[dim] = len(slots)
    put_(param, dim, slots, torch.zeros(shape, dtype=param.dtype, device=slots.device))
