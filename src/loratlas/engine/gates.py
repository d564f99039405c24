"""Pairs with a gate each, which training may close for good.

    delta = s B diag(g) A,      A (r, in),   B (out, r),   gate g (r,)

A pair whose gate is 0 adds nothing: it is dead, and an export leaves it out. Gates become exactly 0 by a threshold xi
after every optimizer step. The proximal operator of xi |g|, the soft threshold, is

    prox:       g <- sign(g) max(|g| - xi, 0)

The official codes of SoRA and CoDyRA write it as three statements in place, the last of which sees what the first two
have shrunk, so that everything below 2 xi goes to 0:

    official:   g <- 0 where |g| < 2 xi, else g - xi sign(g);   |g| = xi exactly stays

A dead pair can come back: the gradient of its gate does not vanish, only xi holds it at 0. Weight decay leaves gates
alone. They are fp32 like every tensor of an adapter, since xi is below the resolution of bf16 near 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loratlas.engine import rank_log
from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.sharded import gather, local

THRESHOLDS = ("prox", "official")


class GatedMethod(LowRankMethod):
    """Plain LoRA with gates. Subclasses say in `after_step` when gates shrink."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv2d")
    params: ClassVar[tuple[str, ...]] = ("A", "B", "gates")
    buffers: ClassVar[tuple[str, ...]] = (rank_log.LOG,)
    growing: ClassVar[tuple[str, ...]] = (rank_log.LOG,)
    undecayed: ClassVar[tuple[str, ...]] = ("gates",)

    def shapes(self, cfg: Any, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n_in), "B": (n_out, r), "gates": (r,), rank_log.LOG: (0, 2)}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {rank_log.LOG: torch.int64}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        """A kaiming uniform, B zero (random with init_weights=False), gates N(0, 1) or, with gate_init="ones", 1."""
        nn.init.kaiming_uniform_(t.A, a=5**0.5)
        if t.cfg.init_weights is False:
            nn.init.kaiming_uniform_(t.B, a=5**0.5)
        if t.cfg.gate_init == "ones":
            nn.init.ones_(t.gates)
        else:
            nn.init.normal_(t.gates)
        rank_log.note(t, 0, t.r)
        return None

    def factors(self, t: View) -> Factors:
        return Factors(t.A, t.B * (t.gates * t.scaling))

    def exported(self, t: View) -> Factors:
        return live_pairs(t, t.scaling)

    def shrink(self, views: Sequence[View], ctx: StepContext, xi: float) -> None:
        """Apply the threshold `xi` to all gates, and write down now and then how many are left."""
        threshold_([t.gates.detach() for t in views], xi, views[0].cfg.threshold)
        if rank_log.due(ctx):
            rank_log.note_all(views, ctx.step, live_ranks(views))


@dataclass
class GatedConfig(AtlasConfig):
    """What methods with gates share.

    Raises:
        UserError: a field is out of its range.
    """

    threshold: str = knob(
        "prox", "'prox': the soft threshold. 'official': as the official code, where all gates below 2 xi go to 0."
    )
    gate_init: str = knob("normal", "Gates start at 'normal', N(0, 1), or at 'ones'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.threshold in THRESHOLDS, "threshold", "'prox' or 'official'")
        self._require(self.gate_init in ("normal", "ones"), "gate_init", "'normal' or 'ones'")
        self._require(self.init_weights in (True, False), "init_weights", "True or False")


def live_pairs(t: View, scaling: float) -> Factors:
    """s B diag(g) A of the pairs whose gate is open."""
    live = t.gates.nonzero().flatten()
    return Factors(t.A[live], t.B[:, live] * (t.gates[live] * scaling))


def threshold_(gates: Sequence[Tensor], xi: float, mode: str) -> None:
    """Shrink the gates in place by the threshold `xi`, by the rule `mode` of the module's text. Shards shrink alone."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gate in map(local, gates):
        alike[gate.device, gate.dtype].append(gate)
    for parts in alike.values() if xi else ():
        every = torch.cat([part.flatten() for part in parts])
        size = every.abs()
        shrunk = torch.where(size > xi, size - xi, size)
        dead = shrunk < xi if mode == "official" else size <= xi
        new = torch.where(dead, torch.zeros_like(every), shrunk.copysign(every))
        torch._foreach_copy_(parts, list(new.split([part.numel() for part in parts])))


def live_ranks(views: Iterable[View]) -> Tensor:
    """Number of open gates of every layer, (layers,) int64. Call it on every rank."""
    gates = [t.gates.detach() for t in views]
    whole = gather([local(gate) for gate in gates], gates)
    return torch.stack([gate.count_nonzero().to(whole[0].device) for gate in whole])


def sparsity_loss(views: Sequence[View]) -> Tensor:
    """Mean of |g| over all gates of all layers."""
    return torch.cat([t.gates for t in views]).abs().mean()
