"""A matrix as a grid of r x r blocks, and a vector as shards of width r.

W (out, in):  W[a, b] (r, r) holds rows a r to (a + 1) r and columns b r to (b + 1) r
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loratlas.errors import UserError


def nearest_divisor(size: int, *wholes: int) -> int:
    """The divisor of all `wholes` that is nearest to `size`, of two equally near ones the larger."""
    common = math.gcd(*wholes)
    return min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: (abs(d - size), -d))


def require_blocks(r: int, n_out: int, n_in: int) -> None:
    """Raise `UserError` unless an (out, in) weight divides into r x r blocks; it names the nearest r that does."""
    if n_out % r or n_in % r:
        near = nearest_divisor(r, n_out, n_in)
        raise UserError(
            f"its {n_out} x {n_in} weight does not divide into {r} x {r} blocks: take r={near} (the nearest)."
        )


def affine_rows(matrix: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """E[a, b] = W[a, b] F_a + T_a: (out, in) of `matrix` W (out, in), factor F and shift T (out / r, r, r)."""
    count, r, _ = factor.shape
    product = torch.bmm(matrix.reshape(count, -1, r), factor).view(count, r, -1, r)
    return (product + shift[:, :, None, :]).view(matrix.shape)


def affine_columns(matrix: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """E[a, b] = W[a, b] F_b + T_b: (out, in) of `matrix` W (out, in), factor F and shift T (in / r, r, r)."""
    count, r, _ = factor.shape
    product = torch.bmm(matrix.reshape(-1, count, r).transpose(0, 1), factor).transpose(0, 1)
    return (product.reshape(-1, r, count, r) + shift.transpose(0, 1)).reshape(matrix.shape)


def times_shards(x: Tensor, factor: Tensor) -> Tensor:
    """x_b F_b^T for every shard x_b of x (..., in), in place of the shard; factor F (in / r, r, r)."""
    count, r, _ = factor.shape
    shards = x.reshape(-1, count, r).transpose(0, 1)
    # of plain batches: the general matmul of torch rounds differently with and without gradients
    return torch.bmm(shards, factor.transpose(1, 2)).transpose(0, 1).reshape(x.shape)


def tiled_identity(r: int, n: int, like: Tensor) -> Tensor:
    """[I I ... I], (r, n), the last one cut: x times its transpose is the sum of the shards of x (..., n)."""
    return torch.eye(r, dtype=like.dtype, device=like.device).repeat(1, -(-n // r))[:, :n]
