"""Hydra: a low-rank branch beside the layer and one after it (arXiv 2309.06922).

    h = W x + b        y = h + s [B_p (A_p x + a_p) + b_p] + s [B_s (A_s h + a_s) + b_s]

The parallel branch makes new features of x, as LoRA does; the sequential one recombines those that W has learned. It
sees h, not h + parallel. Both are linear, so all of it merges:

    W' = W + s (B_p A_p + B_s A_s W)        b' = b + s (B_p a_p + b_p + B_s (a_s + A_s b) + b_s)

Official repository: extremebird/Hydra. Not HydraLoRA, which is a mixture of several B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratlas.engine.binding import BoundConfig
from loratlas.engine.config import knob
from loratlas.engine.method import Method, View
from loratlas.engine.registry import adapter

STARTS: dict[str, Callable[[Tensor], object]] = {
    "kaiming": partial(nn.init.kaiming_uniform_, a=5**0.5),
    "xavier": nn.init.xavier_uniform_,
    "normal": partial(nn.init.normal_, std=0.02),
}


class Branch(NamedTuple):
    """up (down z + down_bias) + up_bias of z = x or h; the biases may be None."""

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None


class Hydra(Method):
    """Tensors: A_par (r_p, in), B_par (out, r_p), A_seq (r_s, out), B_seq (out, r_s), those with rank 0 left out.

    Under branch_bias also a_par (r_p,), b_par (out,), a_seq (r_s,), b_seq (out,); under learnable_scale gain (1,).
    """

    name = "hydra"
    kinds = ("linear", "conv1d")
    params = ("A_par", "B_par", "A_seq", "B_seq", "a_par", "b_par", "a_seq", "b_seq", "gain")

    def bound(self, cfg: HydraConfig) -> bool:
        return cfg.r_sequential != 0

    def scale(self, cfg: HydraConfig, r: int, alpha: float | None) -> float:
        return cfg.scaling if alpha is None else cfg.scaling * alpha / r

    def shapes(self, cfg: HydraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"gain": (1,)} if cfg.learnable_scale else {}
        for end, asked, size in (("par", cfg.r_parallel, n_in), ("seq", cfg.r_sequential, n_out)):
            rank = r if asked is None else asked
            if rank:
                found |= {f"A_{end}": (rank, size), f"B_{end}": (n_out, rank)}
            if rank and cfg.branch_bias:
                found |= {f"a_{end}": (rank,), f"b_{end}": (n_out,)}
        return found

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        for down, up in ((t.A_par, t.B_par), (t.A_seq, t.B_seq)):
            if down is not None:
                STARTS[t.cfg.init](down)
                if not t.cfg.init_weights:
                    nn.init.normal_(up, std=0.1)
        if t.gain is not None:
            t.gain.fill_(1.0)

    def export_rank(self, t: View, total_steps: int) -> int | None:
        return min(sum(down.shape[0] for down in (t.A_par, t.A_seq) if down is not None), *t.op.shape)

    # ---------------------------------------------------------------------------------------------------- forward

    def branches(self, t: View) -> tuple[Branch | None, Branch | None]:
        """(parallel, sequential), the scaling folded into up and up_bias."""
        s = t.scaling if t.gain is None else t.scaling * t.gain
        parts = (t.A_par, t.B_par, t.a_par, t.b_par), (t.A_seq, t.B_seq, t.a_seq, t.b_seq)
        parallel, sequential = (
            None if down is None else Branch(down, up * s, down_bias, None if up_bias is None else up_bias * s)
            for down, up, down_bias, up_bias in parts
        )
        return parallel, sequential

    def branch(self, t: View, x: Tensor, y: Tensor, dropped: Callable[[Tensor], Tensor]) -> Tensor:
        made = [
            self.through(each, source, dropped)
            for each, source in zip(self.branches(t), (x, y), strict=True)
            if each is not None
        ]
        return made[0] if len(made) == 1 else made[0] + made[1].to(made[0].dtype)

    @staticmethod
    def through(branch: Branch, source: Tensor, dropped: Callable[[Tensor], Tensor]) -> Tensor:
        down_bias, up_bias = (None if part is None else part.to(source.dtype) for part in branch[2:])
        hidden = F.linear(source, branch.down.to(source.dtype), down_bias)
        return F.linear(dropped(hidden), branch.up.to(source.dtype), up_bias)

    # ----------------------------------------------------------------------------------------------------- merging

    def lora_factors(self, t: View) -> tuple[Tensor, Tensor]:
        """down = [A_p; A_s W], up = s [B_p, B_s]."""
        parallel, sequential = self.branches(t)
        downs = [] if parallel is None else [parallel.down]
        if sequential is not None:
            downs.append(sequential.down @ t.layer.base_matrix().to(sequential.down.dtype))
        return torch.cat(downs), torch.cat([each.up for each in (parallel, sequential) if each is not None], dim=1)

    def delta_weight(self, t: View) -> Tensor:
        down, up = self.lora_factors(t)
        return up @ down

    def bias_delta(self, t: View) -> Tensor | None:
        parallel, sequential = self.branches(t)
        bias, terms = t.layer.base_bias(), []
        for each in (parallel, sequential):
            if each is not None and each.down_bias is not None and each.up_bias is not None:
                terms.append(each.up @ each.down_bias + each.up_bias)
        if sequential is not None and bias is not None:
            terms.append(sequential.up @ (sequential.down @ bias.to(sequential.down.dtype)))
        return torch.stack(terms).sum(0) if terms else None

    def delta(self, t: View, x: Tensor) -> Tensor:
        """All that both branches add, from x alone; the forward itself has h at hand and takes `branch`."""
        y, shift = t.op.low_rank(x, *self.lora_factors(t)), self.bias_delta(t)
        return y if shift is None else y + shift.to(y.dtype)


@adapter(Hydra())
@dataclass
class HydraConfig(BoundConfig):
    """Hydra. The official code has biases and xavier for VTAB-1k (rank 2), neither for GLUE (ranks 4 and 8).

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(4, "Rank of the branches that have none of their own.")
    r_parallel: int | None = knob(None, "Rank of the parallel branch; 0: without it. None: r.")
    r_sequential: int | None = knob(None, "Rank of the sequential branch; 0: without it. None: r.")
    scaling: float = knob(1.0, "s. A lora_alpha multiplies it by lora_alpha / r.")
    learnable_scale: bool = knob(False, "Train a factor of s, one number a layer, from 1.")
    branch_bias: bool = knob(False, "Biases in both branches. A layer without a bias has one after merging then.")
    lora_dropout: float = knob(0.0, "Dropout between the down and the up projection of both branches.")
    init: str = knob(
        "kaiming",
        "Start of the down projections: 'kaiming' (uniform, as LoRA), 'xavier' (uniform) or 'normal' (0.02 N(0, 1)).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r_parallel", "r_sequential"):
            rank = getattr(self, name)
            self._require(rank is None or (isinstance(rank, int) and rank >= 0), name, "an integer of at least 0")
        both = self.r_parallel != 0 or self.r_sequential != 0
        self._require(both, "r_sequential", "at least 1 where r_parallel is 0")
        self._require(self.scaling > 0.0, "scaling", "positive")
        self._require(self.init in STARTS, "init", f"one of {', '.join(STARTS)}")
