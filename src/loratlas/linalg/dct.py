"""Fixed orthonormal sets of vectors: the discrete cosine basis, its transpose, a seeded random one.

    D[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n)),  row 0 divided by sqrt(2);  D D^T = I

"dct2" are the rows of D, smooth cosines, into which DCT-II takes a signal apart; "dct3" are its columns. The transforms
x -> D x and x -> D^T x are evaluated through one real FFT (Makhoul 1980, IEEE Trans. ASSP 28) where that is cheaper.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from loratlas.errors import UserError

SETS = ("dct2", "dct3", "random")
# longer vectors are not kept as an n x n table
LARGEST_TABLE = 8192


@functools.lru_cache(maxsize=16)
def table(kind: str, n: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All n vectors of a set as the rows of an orthonormal (n, n) matrix, computed in float64 and kept.

    Args:
        kind: "dct2", "dct3" or "random" (Q of a Gaussian matrix drawn on the CPU from `seed`, the same everywhere).
    """
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        found = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    elif kind in SETS:
        found = _cosines(kind, n, torch.arange(n))
    else:
        raise UserError(f"there is no orthonormal set {kind!r}: choose one of {', '.join(SETS)}.")
    return found.to(device=device, dtype=dtype)


def vectors(kind: str, n: int, index: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """The vectors that `index` (r,) names, as rows (r, n) on its device."""
    if kind == "random" or n <= LARGEST_TABLE:
        return table(kind, n, seed, dtype, index.device).index_select(0, index)
    return _cosines(kind, n, index.cpu()).to(device=index.device, dtype=dtype)


def coefficients(x: Tensor, kind: str, dim: int = -1, seed: int = 0, evaluation: str = "auto") -> Tensor:
    """Inner products of the slices of x along `dim` with all n vectors of a set: x's shape, float32 or float64.

    Args:
        evaluation: "matmul" by the table, O(n^2) a slice; "fft", O(n log n), not for "random"; "auto" is "fft" beyond
            `LARGEST_TABLE` and on the CPU, where it is many times as fast.
    """
    if _by_fft(x, kind, dim, evaluation):
        return dct2(x, dim) if kind == "dct2" else dct3(x, dim)
    rows = table(kind, x.shape[dim], seed, x.dtype, x.device)
    return (x.movedim(dim, -1) @ rows.T).movedim(-1, dim)


def norms(
    matrix: Tensor, kind: str, dim: int, power: int, seed: int = 0, evaluation: str = "auto", block: int | None = None
) -> Tensor:
    """For every vector of a set the p-norm of its products with the slices of a matrix along `dim`: (n,).

    The products are never held together: on the CPU a block of them stays in its cache, in half the time.

    Args:
        power: p, 1 or 2.
        block: numbers at a time.
    """
    n = matrix.shape[dim]
    block = block or (2**17 if matrix.device.type == "cpu" else 2**26)
    fast = kind == "dct2" and _by_fft(matrix, kind, dim, evaluation)
    total: Tensor | None = None
    for part in matrix.split(max(1, block // n), dim=1 - dim):
        # real and imaginary parts are put in order once, at the end
        products = torch.view_as_real(_halves(part, dim)) if fast else coefficients(part, kind, dim, seed, evaluation)
        found = (products.abs_() if power == 1 else products.square_()).sum(1 - dim)
        total = found if total is None else total.add_(found)
    assert total is not None
    if fast:
        total = torch.cat((total[:, 0], total[1 : (n + 1) // 2, 1].flip(0)))
    return total if power == 1 else total.sqrt()


def dct2(x: Tensor, dim: int = -1) -> Tensor:
    """D applied along a dimension: x D^T for the last one."""
    n = x.shape[dim]
    halves = _halves(x, dim)
    upper = halves.imag.narrow(dim, 1 if n > 2 else 0, (n - 1) // 2).flip(dim)
    return torch.cat((halves.real, upper.neg()), dim=dim)


def dct3(x: Tensor, dim: int = -1) -> Tensor:
    """D^T applied along a dimension, x D for the last one: the inverse of `dct2`."""
    n = x.shape[dim]
    half = n // 2 + 1
    upper = torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 1, n - 1).flip(dim)), dim=dim)
    halves = torch.complex(x.narrow(dim, 0, half), upper.narrow(dim, 0, half).neg())
    permuted = torch.fft.irfft(halves / _twist(x, dim), n=n, dim=dim)
    return torch.empty_like(permuted).index_copy_(dim, _order(n, x.device), permuted)


def _by_fft(x: Tensor, kind: str, dim: int, evaluation: str) -> bool:
    if evaluation == "auto":
        return kind != "random" and (x.device.type == "cpu" or x.shape[dim] > LARGEST_TABLE)
    return evaluation == "fft"


def _halves(x: Tensor, dim: int) -> Tensor:
    """Coefficients k and n - k of DCT-II, the latter negated, as real and imaginary part of a number; k <= n / 2."""
    permuted = x.index_select(dim, _order(x.shape[dim], x.device))
    return torch.fft.rfft(permuted, dim=dim).mul_(_twist(x, dim))


def _order(n: int, device: torch.device) -> Tensor:
    """Even places upwards, then odd ones downwards."""
    places = torch.arange(n, device=device)
    return torch.cat((places[::2], places[1::2].flip(0)))


def _twist(x: Tensor, dim: int) -> Tensor:
    """c_k exp(-i pi k / (2n)) for k <= n / 2, with c the norms of the cosines; along `dim` of x."""
    n = x.shape[dim]
    k = torch.arange(n // 2 + 1, device=x.device, dtype=x.dtype)
    size = torch.where(k == 0, 1 / math.sqrt(n), math.sqrt(2 / n)).to(x.dtype)
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.polar(size, -math.pi * k / (2 * n)).view(shape)


def _cosines(kind: str, n: int, index: Tensor) -> Tensor:
    """The named vectors in float64, (r, n); the angle is reduced in integers, so that it stays exact for large n."""
    i, j = index.long()[:, None], torch.arange(n)[None]
    order, place = (i, j) if kind == "dct2" else (j, i)
    angle = (order * (2 * place + 1)) % (4 * n)
    found = torch.cos(angle.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
    return torch.where(order == 0, found / math.sqrt(2), found)
