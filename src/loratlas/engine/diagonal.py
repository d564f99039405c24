"""The diagonal core: frozen bases from a factorisation of W, and between them r trained numbers.

    delta = s L diag(d) R,      L (out, r), R (r, in) frozen,      d (r,), which is 0 at the start

W itself is left alone: W' = W + delta has the function and the gradients of the papers' form, which takes the
component s L diag(z0) R out of W and puts s L diag(z) R back, with d = z - z0.

The bases are saved with the adapter, or computed again when it is loaded (save_bases=False: a file of a few numbers a
layer). Factorisations are not unique and differ between machines where singular values coincide or pivots tie, so
then a hash of W and a projection of every component L[:, i] R[i] are saved in their place and checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratlas.engine.binding import fingerprint
from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, View
from loratlas.errors import UserError

# of the largest projection: above the rounding of a factorisation, far below another choice of directions
_TOLERANCE = 1e-3


@dataclass
class DiagonalConfig(AtlasConfig):
    """What the methods with a diagonal core share."""

    rank_may_be_open = True

    save_bases: bool = knob(
        True,
        "Save the frozen bases with the adapter. False: compute them again from W on loading, which is checked; the "
        "file then holds a few numbers a layer.",
    )


class DiagonalMethod(LowRankMethod):
    """Subclasses say what the bases and the diagonal are, and call `place` in `init`.

    Tensors: L (out, r), R (r, in); or, with save_bases=False, source (4,) and probe (r,) with left, right derived.
    """

    buffers: ClassVar[tuple[str, ...]] = ("L", "R", "source", "probe")
    derived = ("left", "right")

    def bases(self, t: View, weight: Tensor) -> tuple[Tensor, Tensor]:
        """L (out, r) and R (r, in) of the (out, in) weight."""
        raise NotImplementedError

    def diagonal(self, t: View) -> Tensor:
        """d (r,), differentiable in the trained parameters."""
        raise NotImplementedError

    def shapes(self, cfg: DiagonalConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        if cfg.save_bases:
            return {"L": (n_out, r), "R": (r, n_in)}
        return {"source": (4,), "probe": (r,)}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"source": torch.int64}

    def factors(self, t: View) -> Factors:
        left, right = (t.left, t.right) if t.L is None else (t.L, t.R)
        return Factors(down=right, up=left * (t.scaling * self.diagonal(t)))

    def place(self, t: View, left: Tensor, right: Tensor, weight: Tensor) -> None:
        """Keep the bases that belong to `weight`."""
        if t.cfg.save_bases:
            t.L.copy_(left)
            t.R.copy_(right)
            return
        t.layer.store("left")[t.adapter] = left
        t.layer.store("right")[t.adapter] = right
        t.source.copy_(fingerprint(weight))
        t.probe.copy_(probe(left, right))

    def derive(self, t: View, weight: Callable[[], Tensor]) -> None:
        # on meta nothing is known; without a source the file is still to be read
        if t.cfg.save_bases or t.source.is_meta or not t.source.any():
            return
        matrix = weight()
        if not torch.equal(fingerprint(matrix).to(t.source.device), t.source):
            raise UserError(
                "the adapter was trained with save_bases=False on another base weight than this one: load the very "
                "same checkpoint in the same dtype."
            )
        if t.left is None:
            left, right = self.bases(t, matrix)
            gap = (probe(left, right).to(t.probe) - t.probe).abs().max()
            if gap > max(_TOLERANCE, 2 * torch.finfo(t.probe.dtype).eps) * t.probe.abs().max():
                raise UserError(
                    "W factorises differently on this machine than where the adapter was trained (its singular values "
                    "or pivots tie): save it there with save_bases=True."
                )
            t.layer.store("left")[t.adapter] = left
            t.layer.store("right")[t.adapter] = right


def probe(left: Tensor, right: Tensor) -> Tensor:
    """(r,): p^T (L[:, i] R[i]) q for fixed random p, q; the signs that a factorisation leaves open cancel."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(size, generator=generator).to(left) for size in (left.shape[0], right.shape[1]))
    return (p @ left) * (right @ q)
