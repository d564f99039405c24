"""RandLoRA (arXiv 2502.00987): an update of full rank from frozen random bases and trained diagonals.

    core = sum_j B_j diag(lam_j) A diag(gam_j),      j = 1..n,  n = ceil(m / r),  m = min(in, out),  M = max(in, out)
    W' = W + s core  (in = m)   or   W + s core^T,   s = alpha / (r sqrt(n)), or PEFT's alpha / r

One A (r, 1, m) and one B (M, n, r) serve the whole model: a layer takes their first entries. lam (r, n), zero at the
start, and gam (n, m) train, n (r + m) numbers a layer: a small r is many bases and many parameters.

All official code pairs the entries thus: p is counted through the columns of B as (n, r) and through the rows of the
scaled A as (r, n), core = sum_p B[:, p // r, p % r] (lam[p // n, p % n] A[p // n] gam[p % n]). The columns of B are
alike, so that is the paper's sum with other draws; it is kept so that tensors mean here what they mean there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.method import Method, View
from loratlas.engine.recompute import recomputed_linear, transformed
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg.seeded import CHUNK, Stream

_ALPHA = {"official": 2, "peft": 20}  # times r, where lora_alpha is None


class RandLora(Method):
    """Tensors: lam (r, n), gam (n, m) trained; A (r_max, 1, m_max), B (M_max, n_max, r_max) shared by all layers."""

    name = "randlora"
    params = ("lam", "gam")
    shared = ("A", "B")

    def scale(self, cfg: RandLoraConfig, r: int, alpha: float | None) -> float:
        return float(_ALPHA[cfg.scaling]) if alpha is None else alpha / r

    def shapes(self, cfg: RandLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        m = min(n_in, n_out)
        n = math.ceil(m / r)
        return {"lam": (r, n), "gam": (n, m)}

    def make_shared(self, cfg: RandLoraConfig, sizes: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        most_in, most_out = max(n_in for _, n_in, _ in sizes), max(n_out for _, _, n_out in sizes)
        m, wide = min(most_in, most_out), max(most_in, most_out)
        ranks = [min(size) for size in sizes]  # a layer has no more directions than its smaller side
        r, n = max(ranks), math.ceil(m / min(ranks))
        stream = Stream(cfg.seed)
        if cfg.basis == "dense":
            a = stream.uniform((r, 1, m), m**-0.5)
            b = torch.empty(wide, n, r)
            for j in range(n):
                b[:, j] = stream.uniform((wide, r), r**-0.5)
        else:
            sparsity = 3.0 if cfg.basis == "sparse" else m**0.5
            a = _ternary(stream, (r, 1, m), sparsity)
            b = _ternary(stream, (wide, n, r), sparsity)
        return {"A": _unit_variance(a), "B": _unit_variance(b)}

    def drawn_again(self, cfg: RandLoraConfig) -> tuple[str, ...]:
        return () if cfg.save_bases else self.shared

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        if t.r > min(t.op.shape):
            return min(t.op.shape)
        t.gam.fill_(1.0 / max(t.gam.shape))
        if not t.cfg.init_weights:
            nn.init.normal_(t.lam)
        return None

    def bases(self, t: View) -> tuple[Tensor, Tensor]:
        """This layer's A (r, 1, m) and B (M, n r), as views of the shared ones where their rank is the layer's."""
        m, wide, n = min(t.op.shape), max(t.op.shape), len(t.gam)
        a, b = t.A.to(t.gam.device), t.B.to(t.gam.device)
        return a[: t.r, :, :m], b[:wide, :n, : t.r].flatten(1)

    def delta_weight(self, t: View) -> Tensor:
        a, b = self.bases(t)
        q = _scaled(a, t.lam, t.gam, self._scaling(t))
        core = b.to(q.dtype) @ q
        return core if self._narrow_in(t) else core.T

    def delta(self, t: View, x: Tensor) -> Tensor:
        if transformed():
            a, b = self.bases(t)
            q = _scaled(a, t.lam, t.gam, self._scaling(t))
            down, up = (q, b) if self._narrow_in(t) else (b.T, q.T)
            return t.op.low_rank(x, down, up)
        return self._recomputed(t, x, None, None, 0.0)

    def whole(self, t: View, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        return self._recomputed(t, x, weight, bias, dropout)

    def _recomputed(self, t: View, x: Tensor, weight: Tensor | None, bias: Tensor | None, dropout: float) -> Tensor:
        (a, b), s = self.bases(t), self._scaling(t)
        across = not self._narrow_in(t)

        def make(lam: Tensor, gam: Tensor) -> Tensor:
            return _scaled(a, lam, gam, s)

        return recomputed_linear(x, weight, bias, b, make, t.lam, t.gam, across=across, dropout=dropout)

    @staticmethod
    def _narrow_in(t: View) -> bool:
        return t.op.shape[1] <= t.op.shape[0]

    @staticmethod
    def _scaling(t: View) -> float:
        return t.scaling / len(t.gam) ** 0.5 if t.cfg.scaling == "official" else t.scaling


def _scaled(a: Tensor, lam: Tensor, gam: Tensor, scaling: float) -> Tensor:
    """(r n, m): row k n + j is scaling lam[k, j] A[k] gam[j]."""
    return ((a * (scaling * lam)[:, :, None]) * gam).flatten(0, 1)


def _ternary(stream: Stream, shape: tuple[int, int, int], sparsity: float) -> Tensor:
    """-1, 0 or 1, of which 1 / sparsity are not zero."""
    drawn = torch.empty(shape)
    for rows in drawn.split(max(1, CHUNK // (shape[1] * shape[2]))):
        u, edge = stream.unit(tuple(rows.shape)), 1.0 / (2.0 * sparsity)
        rows.copy_((u > 1.0 - edge).float() - (u < edge).float())
    return drawn


def _unit_variance(drawn: Tensor) -> Tensor:
    # sums in fp64: the result must not depend on how many threads add
    size, total = drawn.numel(), drawn.sum(dtype=torch.float64)
    square = torch.linalg.vector_norm(drawn, dtype=torch.float64).square()
    variance = float((square - total.square() / size) / max(size - 1, 1))
    if variance > 0.0:
        return drawn.div_(variance**0.5)
    if not drawn.any():
        raise UserError("a sparse basis of layers as small as these came out as zeros: use basis='dense'.")
    return drawn.sign_()  # a single entry


@adapter(RandLora())
@dataclass
class RandLoraConfig(AtlasConfig):
    """RandLoRA. Here a small r means many bases and many parameters: about m^2 / r + m a layer, m = min(in, out).

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(32, "Rank of a basis: ceil(m / r) of them add up to the full rank m = min(in, out).")
    lora_alpha: float | None = knob(
        None, "Numerator alpha of the scaling; None means 2 r, or 20 r with scaling='peft'."
    )
    scaling: str = knob("official", "'official': s = alpha / (r sqrt(n)). 'peft': s = alpha / r, as PEFT 0.21 has it.")
    basis: str = knob(
        "dense", "Entries of the bases: 'dense', 'sparse' (two thirds zero) or 'very-sparse' (all but 1 in sqrt(m))."
    )
    save_bases: bool = knob(
        True,
        "Save the random bases with the adapter, once. False: draw them again from `seed` on loading, which is "
        "checked; the file then holds the trained numbers only.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.scaling in _ALPHA, "scaling", "'official' or 'peft'")
        self._require(self.basis in ("dense", "sparse", "very-sparse"), "basis", "'dense', 'sparse' or 'very-sparse'")
