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


def coefficients(x: Tensor, kind: str, seed: int = 0, evaluation: str = "auto") -> Tensor:
    """Inner products of the rows of x (..., n) with all n vectors of a set: (..., n), float32 or float64.

    Args:
        evaluation: "matmul" by the table, O(n^2) a row; "fft", O(n log n), not for "random"; "auto" is "fft" beyond
            `LARGEST_TABLE` and on the CPU, where it is many times as fast.
    """
    n = x.shape[-1]
    if evaluation == "auto":
        evaluation = "fft" if x.device.type == "cpu" or n > LARGEST_TABLE else "matmul"
    if kind == "random" or evaluation == "matmul":
        return x @ table(kind, n, seed, x.dtype, x.device).T
    return dct2(x) if kind == "dct2" else dct3(x)


def dct2(x: Tensor) -> Tensor:
    """x D^T along the last dimension."""
    n = x.shape[-1]
    # even places upwards, odd ones downwards
    spectrum = torch.fft.rfft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), dim=-1)) * _twist(n, x)
    upper = spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)
    return torch.cat((spectrum.real, upper.neg()), dim=-1)


def dct3(x: Tensor) -> Tensor:
    """x D along the last dimension: the inverse of `dct2`."""
    n = x.shape[-1]
    half = n // 2 + 1
    mirrored = torch.cat((torch.zeros_like(x[..., :1]), x[..., 1:].flip(-1)), dim=-1)[..., :half]
    permuted = torch.fft.irfft(torch.complex(x[..., :half], mirrored.neg()) / _twist(n, x), n=n)
    result = torch.empty_like(permuted)
    result[..., ::2] = permuted[..., : (n + 1) // 2]
    result[..., 1::2] = permuted[..., (n + 1) // 2 :].flip(-1)
    return result


def _twist(n: int, like: Tensor) -> Tensor:
    """c_k exp(-i pi k / (2n)) for k <= n / 2, with c the norms of the cosines."""
    k = torch.arange(n // 2 + 1, device=like.device, dtype=like.dtype)
    size = torch.where(k == 0, 1 / math.sqrt(n), math.sqrt(2 / n)).to(like.dtype)
    return torch.polar(size, -math.pi * k / (2 * n))


def _cosines(kind: str, n: int, index: Tensor) -> Tensor:
    """The named vectors in float64, (r, n); the angle is reduced in integers, so that it stays exact for large n."""
    i, j = index.long()[:, None], torch.arange(n)[None]
    order, place = (i, j) if kind == "dct2" else (j, i)
    angle = (order * (2 * place + 1)) % (4 * n)
    found = torch.cos(angle.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
    return torch.where(order == 0, found / math.sqrt(2), found)
