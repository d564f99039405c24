"""Rank-one pairs (column b_k of B, row a_k of A) that start away from zero, retire and are re-seeded.

The update of one layer is kept in difference form. With (B*, A*) the pairs' starting values:

    delta = s (B A - B* A*) + s H_B H_A,      B A - B* A* = [B - B*, B*] [A; A - A*]

which is exactly 0 at the start in any dtype and has the gradients of s B A. A pair that retires leaves
b a - b* a* = (b - b*) a + b* (a - a*) in the history H: two ranks each. The function is the same before and after:
what the slot loses the history gains, and the newcomer starts at b a - b a = 0. Pairs that all start with b* = 0 need
no starts: the update is s B A + s H_B H_A, and a retired pair takes one rank of the history.

Tensors, by name: A (r, in), B (out, r) trainable; A0, B0 their starts, if any; HA (h, in), HB (out, h) the history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loratlas.engine.method import Factors, View
from loratlas.engine.sharded import from_rank0, put_, refuse_cast, whole
from loratlas.linalg.lowrank import compress

TENSORS = ("A", "B")
STARTS = ("A0", "B0")
HISTORY = ("HA", "HB")


def shapes(r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """Shapes of A, B and their starts."""
    return {"A": (r, n_in), "B": (n_out, r), "A0": (r, n_in), "B0": (n_out, r)}


def start(t: View, down: Tensor, up: Tensor) -> None:
    """Let the pairs start at A = down (r, in), B = up (out, r)."""
    for name, value in (("A", down), ("B", up), ("A0", down), ("B0", up)):
        if getattr(t, name) is not None:
            getattr(t, name).copy_(value)


def principal_factors(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(down, up) with scaling * up @ down = U diag(S) V^T, the square root of sigma / scaling on either side."""
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def difference(t: View) -> Factors:
    """The live pairs' update in difference form, s (B A - B* A*); without starts (plain LoRA) s B A."""
    if t.A0 is not None:
        refuse_cast(t.A, t.A0)
    return Factors(t.A, _scaled(t, t.B), start_down=t.A0, start_up=_scaled(t, t.B0))


def with_history(t: View) -> Factors:
    """The whole update: live pairs, and as frozen part the retired ones."""
    live = difference(t)
    if t.HA.shape[0] == 0:
        return live
    return live._replace(frozen_down=t.HA, frozen_up=_scaled(t, t.HB))


def without_start(t: View) -> Factors:
    """s B A alone: what is left of the update once `folded_weight` is the weight."""
    return Factors(t.A, _scaled(t, t.B))


def _scaled(t: View, up: Any) -> Any:
    return up if t.scaling == 1.0 or up is None else up * t.scaling


def retire(t: View, slots: Tensor) -> None:
    """Move what the pairs in `slots` (int64, (k,)) have learned into the history."""
    downs, ups = [t.HA, whole(t.A)[slots]], [t.HB, whole(t.B)[:, slots]]
    if t.A0 is not None:
        a0, b0 = t.A0[slots], t.B0[:, slots]
        downs, ups = [*downs, downs[1] - a0], [t.HB, ups[1] - b0, b0]
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    if down.shape[0] > min(t.op.shape):
        # more ranks than the layer has directions: re-factor, dropping numerical zeros only
        packed = compress(up, down)
        down, up = from_rank0(packed.down), from_rank0(packed.up)
    t.grow("HA", down)
    t.grow("HB", up)


def reseed(t: View, slots: Tensor, down: Tensor, up: Tensor) -> None:
    """Let the pairs in `slots` start again at down (k, in), up (out, k), in place."""
    for rows, columns in ((t.A, t.B), (t.A0, t.B0))[: 1 if t.A0 is None else 2]:
        put_(rows, 0, slots, down)
        put_(columns, 1, slots, up)


def folded_weight(t: View, weight: Tensor) -> Tensor:
    """W + s (H - B* A*): the dense weight on which s B A alone is the whole update. weight: (out, in)."""
    up = t.HB if t.A0 is None else torch.cat((t.HB, -t.B0), dim=1)
    down = t.HA if t.A0 is None else torch.cat((t.HA, t.A0))
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=t.scaling)
