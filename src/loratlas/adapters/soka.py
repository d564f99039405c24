"""SoKA: a short sum of Kronecker products that starts from the Kronecker SVD of the weight (arXiv 2506.15251).

    W' = W + s sum_k (A_k (x) B_k - A*_k (x) B*_k)        A_k (m, n), B_k (p, q), out = m p, in = n q

The starts A*_k = sqrt(s_k) U_k and B*_k = sqrt(s_k) V_k are the leading terms of the Kronecker SVD of W; how many a
layer gets is read off its spectrum. K (m n + p q) parameters, and an update of any rank. No official code is known.

The difference is taken as (A - A*) (x) B + A* (x) (B - B*), in fp32: exactly 0 at the start in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.dense import dense_linear
from loratlas.engine.method import Method, View
from loratlas.engine.registry import adapter
from loratlas.linalg import kronecker
from loratlas.linalg.kronecker import Shape


class SoKA(Method):
    """Tensors: A (K, m, n), B (K, p, q) trainable; A0, B0 the starts of those terms that do not start at zero."""

    name = "soka"
    kinds = ("linear", "conv1d")
    params = ("A", "B")
    buffers = ("A0", "B0")
    chooses_rank = True

    def gather(self, cfg: SoKAConfig) -> tuple[str, ...]:
        return ("gradient",) if cfg.source == "gradient" else ()

    def factor_shape(self, cfg: SoKAConfig, n_in: int, n_out: int) -> Shape:
        if cfg.factor_shape == "auto":
            return kronecker.balanced_shape(n_out, n_in)
        m, n = cfg.factor_shape
        return kronecker.shape_for(n_out, n_in, m, n)

    def shapes(self, cfg: SoKAConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        m, p, n, q = self.factor_shape(cfg, n_in, n_out)
        every = r + cfg.extra_terms
        terms: dict[str, tuple[int, ...]] = {"A": (every, m, n), "B": (every, p, q)}
        if cfg.source == "weight" and cfg.residual:
            terms |= {"A0": (r, m, n), "B0": (r, p, q)}
        return terms

    def rank_in(self, cfg: SoKAConfig, tensors: dict[str, Tensor]) -> int | None:
        return len(tensors["A"]) - cfg.extra_terms if "A" in tensors else None

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        cfg: SoKAConfig = t.cfg
        shape = self.factor_shape(cfg, t.op.shape[1], t.op.shape[0])
        source = t.statistics["gradient"].to(t.A) if cfg.source == "gradient" else weight()
        terms = min(t.r, shape.m * shape.n, shape.p * shape.q)
        u, s, v = kronecker.kronecker_svd(source, shape, terms, **cfg.svd_options())
        if cfg.rank_rule:
            terms = max(min(cfg.r_min, terms), self.worth_keeping(cfg, s, float(source.double().square().sum())))
        if terms < t.r:
            t.shrink(terms)
        root = (s[:terms] / t.scaling).sqrt()[:, None, None]
        t.A[:terms].copy_(root * u[:terms])
        if cfg.source == "weight":
            t.B[:terms].copy_(root * v[:terms])
            if cfg.residual:
                t.A0.copy_(t.A[:terms])
                t.B0.copy_(t.B[:terms])
        if cfg.extra_terms:
            torch.nn.init.normal_(t.A[terms:], std=(shape.m * shape.n) ** -0.25)
        if not cfg.init_weights:
            t.B.add_(torch.randn_like(t.B) * (t.B.abs().mean() + 0.1))

    @staticmethod
    def worth_keeping(cfg: SoKAConfig, s: Tensor, total: float) -> int:
        """min(energy rule, elbow rule) of the singular values s, (K,), of a matrix with squared norm `total`."""
        by_energy = kronecker.terms_by_energy(s, total, cfg.tau)
        return min(by_energy, kronecker.terms_by_elbow(s)) if cfg.elbow else by_energy

    def terms(self, t: View) -> tuple[Tensor, Tensor]:
        """(a (k, m, n), b (k, p, q)) with delta = sum_k a_k (x) b_k, scaling folded in."""
        if t.A0 is None:
            a, b = t.A, t.B
        else:
            live = len(t.A0)
            a = torch.cat((t.A[:live] - t.A0, t.A0, t.A[live:]))
            b = torch.cat((t.B[:live], t.B[:live] - t.B0, t.B[live:]))
        return a, b if t.scaling == 1.0 else b * t.scaling

    def delta(self, t: View, x: Tensor) -> Tensor:
        a, b = self.terms(t)
        return kronecker.apply_kronecker_sum(x, a.to(x.dtype), b.to(x.dtype))

    def whole(self, t: View, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor | None:
        a, b = self.terms(t)
        if dropout > 0.0 or not kronecker.sum_is_cheaper(x.numel() // x.shape[-1], a, b):
            return None
        return dense_linear(x, weight, bias, kronecker.kronecker_sum(a, b))

    def delta_weight(self, t: View) -> Tensor:
        return kronecker.kronecker_sum(*self.terms(t))


@adapter(SoKA())
@dataclass
class SoKAConfig(SvdConfig):
    """SoKA. The paper's rank rule and training details are reconstructed; each is an option.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(16, "Largest number of Kronecker terms a layer gets; exactly that many without rank_rule.")
    factor_shape: Any = knob(
        "auto", "Shape [m, n] of A, where m divides out and n divides in; 'auto': the split with fewest parameters."
    )
    rank_rule: bool = knob(True, "Choose the number of terms by the spectrum: by tau and, if set, the elbow.")
    tau: float = knob(0.9, "Share of the squared norm that the terms must hold.")
    elbow: bool = knob(True, "Also stop at the elbow of the singular values.")
    r_min: int = knob(1, "Smallest number of terms that the rule may choose.")
    source: str = knob(
        "weight",
        "'weight': start from the terms of W. 'gradient': A from the terms of the first gradient (needs calibrate), "
        "B zero.",
    )
    residual: bool = knob(
        True, "Take the starting terms out of W, so that the function is kept; False adds them on top (source weight)."
    )
    extra_terms: int = knob(0, "Further terms with A random and B zero (ours), to learn what W has nothing of.")

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.factor_shape
        pair = isinstance(shape, (list, tuple)) and len(shape) == 2 and all(isinstance(v, int) for v in shape)
        self._require(shape == "auto" or pair, "factor_shape", "'auto' or a pair [m, n] of integers")
        self._require(0.0 < self.tau <= 1.0, "tau", "in (0, 1]")
        self._require(1 <= self.r_min <= self.r, "r_min", f"between 1 and r={self.r}")
        self._require(self.source in ("weight", "gradient"), "source", "'weight' or 'gradient'")
        self._require(self.extra_terms >= 0, "extra_terms", "at least 0")
