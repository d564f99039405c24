"""SVFit: train the largest singular values of a weight (arXiv 2409.05926). No official code is known.

    W = U S V^T,      W' = W + U_r diag(sigma - S_r) V_r^T,      sigma trained, sigma = S_r at the start

The paper writes W' = W_e + U_r diag(sigma) V_r^T with W_e = W - U_r diag(S_r) V_r^T: the same function. Trained is the
shift sigma - S_r, not sigma: under Adam it moves alike step for step, and weight decay pulls it towards W instead of
pulling W's own singular values towards 0. sigma may change order and sign. r numbers a layer train, with
dL/dsigma_i = u_i^T G v_i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas.engine.config import knob
from loratlas.engine.diagonal import DiagonalConfig, DiagonalMethod
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.linalg.svd import METHODS, top_svd


class SVFit(DiagonalMethod):
    """Tensors beside the bases: shift (r,) trained; S (r,) the singular values of W that it shifts."""

    name = "svfit"
    kinds = ("linear", "conv1d", "conv2d")
    params = ("shift",)
    buffers = (*DiagonalMethod.buffers, "S")

    def shapes(self, cfg: SVFitConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        return {"shift": (r,), "S": (r,), **super().shapes(cfg, r, n_in, n_out)}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        matrix, most = weight(), min(t.op.shape)
        if t.r > most:
            return most
        if t.cfg.r is None and t.r == most:  # not fixed by rank_pattern either
            useful = energy_rank(torch.linalg.svdvals(matrix), t.cfg.energy, t.cfg.energy_norm)
            if useful < most:
                return useful
        u, s, vh = self._svd(t, matrix)
        t.S.copy_(s)
        self.place(t, u, vh, matrix)
        if not t.cfg.init_weights:
            t.shift.copy_(torch.randn_like(t.shift) * (1.0 if t.cfg.relative else s.mean()))
        return None

    def bases(self, t: View, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, _, vh = self._svd(t, weight)
        return u, vh

    @staticmethod
    def _svd(t: View, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return top_svd(weight, t.r, method=t.cfg.svd_method, seed=t.cfg.seed)

    def diagonal(self, t: View) -> Tensor:
        return t.S * t.shift if t.cfg.relative else t.shift

    def sigma(self, t: View) -> Tensor:
        """The trained singular values (r,), signed and in the order of those of W."""
        return t.S + self.diagonal(t)


def energy_rank(s: Tensor, energy: float, norm: str) -> int:
    """The smallest k whose first k of all singular values `s` hold the share `energy` of the sum of s^2 or of s."""
    shares = (s.double().square() if norm == "squared" else s.double()).cumsum(0)
    return min(int((shares < energy * shares[-1]).sum()) + 1, s.numel())


@adapter(SVFit())
@dataclass
class SVFitConfig(DiagonalConfig):
    """SVFit. Train with weight decay 0 and a rate for singular values, larger than LoRA's.

    Raises:
        UserError: a field is out of its range.
    """

    r: int | None = knob(  # type: ignore[assignment]
        None, "Singular values that train in a layer; None lets `energy` decide in every layer."
    )
    energy: float = knob(0.99, "With r=None: share of the spectrum that the trained values hold together, in (0, 1].")
    energy_norm: str = knob("squared", "What the share is of: 'squared' (sum of sigma^2) or 'nuclear' (sum of sigma).")
    relative: bool = knob(False, "Train sigma / S - 1 instead of sigma - S, so that large values move faster.")
    svd_method: str = knob("auto", "SVD of W: 'auto', 'full', 'gram' or 'lowrank' (seeded, randomised).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0.0 < self.energy <= 1.0, "energy", "in (0, 1]")
        self._require(self.energy_norm in ("squared", "nuclear"), "energy_norm", "'squared' or 'nuclear'")
        self._require(self.svd_method in METHODS, "svd_method", f"one of {', '.join(METHODS)}")
