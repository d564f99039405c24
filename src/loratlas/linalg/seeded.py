"""Tensors that come from a seed instead of a file: drawn the same way everywhere, in pieces of bounded size.

Numbers are drawn in fp32 on the CPU by a private generator and then moved and cast: CPU and CUDA generators differ, so
a tensor drawn where it is used would be another one on another device. Nothing here reads or changes torch's global
random state. Uniform numbers only: they are made one after the other, so that pieces join to exactly the whole, which
torch does not promise of normal ones.

What is drawn again elsewhere is checked by a fingerprint that is kept with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**20  # numbers drawn at once, 4 MB
_BLOCKS = 8
# of the largest sum: above the rounding of a basis that was kept in bfloat16, far below other numbers
_TOLERANCE = 1e-2


def seed_of(*names: object) -> int:
    """A seed below 2^32, all that torch's CPU generator looks at, from what the numbers are for."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


class Stream:
    """fp32 numbers in a fixed order from `seed`; every draw goes on where the last one ended."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def uniform(self, shape: tuple[int, ...], bound: float = 1.0) -> Tensor:
        """Uniform in [-bound, bound)."""
        return self._drawn(shape, -bound, bound)

    def unit(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1)."""
        return self._drawn(shape, 0.0, 1.0)

    def _drawn(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        room = torch.empty(shape, dtype=torch.float32, device="cpu")
        return room.uniform_(low, high, generator=self._generator)


@dataclass(frozen=True)
class Bases:
    """k matrices of one shape: uniform numbers in [-bound, bound) over `divisor`, one matrix after the other."""

    seed: int
    k: int
    shape: tuple[int, int]
    bound: float = 1.0
    divisor: float = 1.0

    def pieces(self) -> Iterator[Tensor]:
        """The matrices as rows, (some, rows * columns) at a time and at most `CHUNK` numbers, or one matrix."""
        stream, size = Stream(self.seed), self.shape[0] * self.shape[1]
        some = max(1, CHUNK // size)
        for first in range(0, self.k, some):
            drawn = stream.uniform((min(some, self.k - first), size), self.bound)
            yield drawn if self.divisor == 1.0 else drawn.div_(self.divisor)

    def whole(self) -> Tensor:
        """(k, rows * columns), all of it in memory."""
        return torch.cat(list(self.pieces()))


def combine(coefficients: Tensor, bases: Bases) -> Tensor:
    """sum_i c_i basis_i, in the shape of one basis and the dtype of `coefficients` (k,).

    The bases are drawn piece by piece, and once more in the backward pass, dL/dc_i = <dL/dsum, basis_i>: nothing of
    their size is kept in between. A derivative of any order is that of the explicit sum.
    """
    return _Combination.apply(coefficients, bases)


class _Combination(torch.autograd.Function):
    @staticmethod
    def forward(coefficients: Tensor, bases: Bases) -> Tensor:
        total = coefficients.new_zeros(bases.shape[0] * bases.shape[1])
        first = 0
        for piece in bases.pieces():
            total += coefficients[first : first + len(piece)] @ piece.to(coefficients)
            first += len(piece)
        return total.view(bases.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Bases], output: Tensor) -> None:
        ctx.bases = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flat = grad.reshape(-1)
        return torch.cat([piece.to(flat) @ flat for piece in ctx.bases.pieces()]), None


def fingerprint(values: Tensor) -> Tensor:
    """(8,) fp32: sums of the eighths of `values` in their order. Every entry counts, and rounding hardly does."""
    flat = values.detach().reshape(-1)
    sums = [block.sum(dtype=torch.float64) for block in flat.tensor_split(_BLOCKS)]
    return torch.stack(sums).float().cpu()


def same_numbers(found: Tensor, kept: Tensor) -> bool:
    """Whether two fingerprints are of the same numbers."""
    if found.shape != kept.shape:
        return False
    return bool((found - kept.to(found)).abs().max() <= _TOLERANCE * kept.abs().max().to(found))
