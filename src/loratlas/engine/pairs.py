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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loratlas.engine.factors import Factors
from loratlas.engine.method import View
from loratlas.engine.sharded import from_rank0, is_sharded, put_, refuse_cast, whole
from loratlas.errors import UserError
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
    if getattr(t, "A0", None) is not None:
        refuse_cast(t.A, t.A0)
    return Factors(t.A, _scaled(t, t.B), start_down=t.A0, start_up=_scaled(t, t.B0))


def with_history(t: View) -> Factors:
    """The whole update: live pairs, and as frozen part the retired ones."""
    return add_history(t, difference(t))


def add_history(t: View, live: Factors) -> Factors:
    """`live` with the history as its frozen part."""
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
    a, b = whole(t.A)[slots], whole(t.B)[:, slots]
    if t.A0 is None:
        archive(t, a, b)
        return
    a0, b0 = t.A0[slots], t.B0[:, slots]
    archive(t, torch.cat((a, a - a0)), torch.cat((b - b0, b0), dim=1))


def archive(t: View, down: Tensor, up: Tensor) -> None:
    """Add up @ down, with down (k, in) and up (out, k) before scaling, to the history."""
    down, up = torch.cat((t.HA, down)), torch.cat((t.HB, up), dim=1)
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
    down, up = t.HA, t.HB
    if getattr(t, "A0", None) is not None:
        down, up = torch.cat((down, t.A0)), torch.cat((up, -t.B0), dim=1)
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=t.scaling)


def fold(t: View, weight: Callable[[], Tensor], option: str, instead: str) -> None:
    """Store `folded_weight` as the derived tensor "folded", a working copy in the base's dtype that the forward uses.

    Raises:
        UserError: the base is quantised or already adapted; `option` is what asked for this, `instead` what works.
    """
    base: Tensor = t.layer.weight
    if t.layer.quantization_backend is not None or t.layer.base_layer is not t.layer.get_base_layer():
        raise UserError(f"{option} needs a dense base layer, not a quantised or already adapted one: use {instead}.")
    if base.device.type != "meta":
        t.layer.store("folded")[t.adapter] = folded_weight(t, weight()).to(base.dtype)


def refuse_sharded_base(t: View, option: str, instead: str) -> None:
    """Raise `UserError` if `fold` would have to see a weight of which a rank holds only a part."""
    if is_sharded(t.layer.weight):
        raise UserError(
            f"{option} needs a dense working copy of every weight, but under FSDP2 a rank holds only a part of it: "
            f"use {instead}."
        )
