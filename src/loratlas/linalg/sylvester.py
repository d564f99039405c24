"""Inverses and Sylvester equations of stacks of small symmetric matrices, by their eigenvectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# relative eigenvalues of a Gram matrix below which its factor, in float32, holds nothing but rounding
_ZERO = 1e-13


class Spectrum(NamedTuple):
    """Of n positive semidefinite matrices: eigenvalues (n, r), ascending, and eigenvectors (n, r, r)."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> Spectrum:
        """matrices: (n, r, r), float64. One call of the eigensolver for all.

        Raises:
            torch.linalg.LinAlgError: an entry is not finite.
        """
        values, vectors = torch.linalg.eigh(matrices)
        return cls(values.clamp_min(0.0), vectors)

    def inverse(self, jitter: float = 0.0) -> Tensor:
        """(M + jitter tr(M) / r I)^-1 on the range of M and 0 beyond it, (n, r, r); 0 for M = 0.

        `jitter` is relative, so that the inverse of c M is 1 / c times that of M however small M is.
        """
        shift = jitter * self.values.mean(-1, keepdim=True)
        holds = self.values > _ZERO * self.values[..., -1:]
        inverted = torch.where(holds, 1.0 / (self.values + shift), 0.0)
        return (self.vectors * inverted.unsqueeze(-2)) @ self.vectors.mT


def solve_sylvester(left: Spectrum, right: Spectrum, c: Tensor) -> Tensor:
    """X, (n, r, q), with L X + X R = C; L (n, r, r) and R (n, q, q) by their spectra.

    X = U [(U^T C V)_ij / (a_i + b_j)] V^T. Where a_i + b_j = 0 there is no such X and that entry is 0.
    """
    sums = left.values.unsqueeze(-1) + right.values.unsqueeze(-2)
    inner = left.vectors.mT @ c @ right.vectors
    inner = torch.where(sums > _ZERO * sums[..., -1:, -1:], inner / sums, 0.0)
    return left.vectors @ inner @ right.vectors.mT
