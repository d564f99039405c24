"""The LDU factorisation with row pivoting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loratlas.errors import UserError


class LDU(NamedTuple):
    """W[rows] = lower @ diag(diagonal) @ upper, k = min(m, n).

    rows: (m,) int64, a permutation. lower: (m, k), ones on the diagonal, entries of at most 1. diagonal: (k,), signed
    and in the order of the pivots, not of size. upper: (k, n), ones on the diagonal but for degenerate pivots.
    """

    rows: Tensor
    lower: Tensor
    diagonal: Tensor
    upper: Tensor

    def left(self) -> Tensor:
        """P L (m, k), so that W = P L diag(D) U: the rows of `lower` where those of W are."""
        left = torch.empty_like(self.lower)
        left[self.rows] = self.lower
        return left


def ldu(weight: Tensor) -> LDU:
    """Factor W (m, n) by LU with partial pivoting and divide the pivots out of U.

    A pivot of at most max(m, n) eps max|U| is numerically zero (W has no full rank); its row of U stays undivided and
    its entry of D is 1, so the product is W all the same and no entry overflows.

    Raises:
        UserError: not a matrix of finite real numbers.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise UserError(
            f"ldu needs a real floating-point matrix, but got shape {tuple(weight.shape)} of {weight.dtype}."
        )
    if not torch.isfinite(weight).all():
        raise UserError(
            f"The {weight.shape[0]}x{weight.shape[1]} matrix holds NaN or infinite entries; check its source."
        )
    k = min(weight.shape)
    # lu_factor would refuse singular matrices
    packed, swaps, _ = torch.linalg.lu_factor_ex(weight.detach(), pivot=True)
    upper = packed[:k].triu()
    lower = packed[:, :k].tril(-1)
    lower.diagonal().fill_(1.0)
    pivots = upper.diagonal().clone()
    tiny = pivots.abs() <= max(weight.shape) * torch.finfo(upper.dtype).eps * upper.abs().max()
    diagonal = torch.where(tiny, torch.ones_like(pivots), pivots)
    rows = _permutation(swaps.tolist(), weight.shape[0]).to(weight.device)
    return LDU(rows, lower, diagonal, upper / diagonal[:, None])


def _permutation(swaps: list[int], m: int) -> Tensor:
    """The order of the rows after LAPACK's exchanges: row i with row swaps[i] (from 1), one after the other.

    torch has this only as a dense (m, m) matrix.
    """
    rows = list(range(m))
    for i, other in enumerate(swaps):
        rows[i], rows[other - 1] = rows[other - 1], rows[i]
    return torch.tensor(rows)
