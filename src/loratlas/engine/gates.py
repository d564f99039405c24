"""Pairs with a gate each, which training may close for good.

    delta = s B diag(g) A,      A (r, in),   B (out, r),   gate g (r,)

A pair whose gate is 0 adds nothing: it is dead, and an export leaves it out. Gates become exactly 0 by a threshold xi
after every optimizer step. The proximal operator of xi |g|, the soft threshold, is

    prox:       g <- sign(g) max(|g| - xi, 0)

The official codes of SoRA and CoDyRA write it as three statements in place, the last of which sees what the first two
have shrunk, so that everything below 2 xi goes to 0:

    official:   g <- 0 where |g| < 2 xi, else g - xi sign(g);   |g| = xi exactly stays
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loratlas.engine.method import Factors, LowRankMethod, View
from loratlas.engine.sharded import local, whole

THRESHOLDS = ("prox", "official")


class GatedMethod(LowRankMethod):
    """Plain LoRA with gates. Subclasses say in `after_step` when gates shrink."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv2d")
    params: ClassVar[tuple[str, ...]] = ("A", "B", "gate")

    def shapes(self, cfg: Any, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n_in), "B": (n_out, r), "gate": (r,)}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        """A kaiming uniform, B zero (random with init_weights=False), gates N(0, 1) or, with gate_init="ones", 1."""
        nn.init.kaiming_uniform_(t.A, a=5**0.5)
        if t.cfg.init_weights is False:
            nn.init.kaiming_uniform_(t.B, a=5**0.5)
        if t.cfg.gate_init == "ones":
            t.gate.fill_(1.0)
        else:
            nn.init.normal_(t.gate)
        return None

    def factors(self, t: View) -> Factors:
        return Factors(t.A, t.B * (t.gate * t.scaling))


def threshold_(gates: Sequence[Tensor], xi: float, mode: str) -> None:
    """Shrink the gates in place by the threshold `xi`, by the rule `mode` of the module's text. Shards shrink alone."""
    for gate in map(local, gates):
        size = gate.abs()
        shrunk = torch.where(size == xi, size, size - xi) if mode == "official" else size - xi
        dead = (size < 2 * xi) & (size != xi) if mode == "official" else size <= xi
        gate.copy_(torch.where(dead, torch.zeros_like(gate), shrunk.copysign(gate)))


def live_ranks(views: Iterable[View]) -> Tensor:
    """Number of open gates of every layer, (layers,) int64."""
    return torch.stack([whole(t.gate).count_nonzero() for t in views])


def sparsity_loss(views: Sequence[View]) -> Tensor:
    """Mean of |g| over all gates of all layers."""
    return torch.cat([t.gate for t in views]).abs().mean()
