"""Leading eigenvectors of a symmetric matrix C >= 0, by subspace iteration with a Chebyshev filter.

    X <- T_m(2 C / c - 1) X,      c: the smallest Ritz value of the present subspace

T_m stays within [-1, 1] on the unwanted eigenvalues [0, c] and grows faster above them than any other polynomial of
degree m: like exp(m arccosh(2 theta / c - 1)). So few products with C do what takes plain subspace iteration hundreds
where eigenvalues lie close (Zhou, Saad, Tiago & Chelikowsky 2006, J. Comput. Phys. 219). Every pass is checked by its
residual; a result is as good as an eigensolver's or it is none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_SIZE = 64  # below, a full eigendecomposition takes no longer
# of ||C v - theta v|| / theta_k; the backward error of LAPACK's float32 SVD amounts to ten times as much
_TOLERANCE = 1e-7
_PASSES, _MAX_DEGREE = 6, 40
_MIN_EXTRA = 16  # vectors beside the k wanted ones: the wider, the larger the gap to c
# a filtered block holds the weakest wanted vector beside the strongest: their ratio must stay well above the rounding
_LOG_RATIO = 22.0


def pays(size: int, k: int) -> bool:
    """Whether the k leading eigenvectors of a matrix of that size come cheaper so than from all of them."""
    return size >= MIN_SIZE and 8 * k <= size


def leading_eigenvectors(matrix: Tensor, k: int, seed: int) -> Tensor | None:
    """The k leading eigenvectors as columns (d, k), eigenvalues ascending; None if they do not converge.

    Args:
        matrix: C, (d, d), symmetric positive semidefinite, float64.
        k: 1 <= k < d.
        seed: of the private generator of the start, drawn on the CPU.
    """
    size = matrix.shape[0]
    width = min(size, k + max(k, _MIN_EXTRA))
    generator = torch.Generator(device="cpu").manual_seed(seed)
    block = torch.randn(size, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    block = matrix @ (matrix @ block)
    for _ in range(_PASSES):
        basis = torch.linalg.qr(block).Q
        image = matrix @ basis
        theta, rotation = torch.linalg.eigh(basis.T @ image)
        vectors, images = basis @ rotation, image @ rotation
        error = float((images - vectors * theta)[:, -k:].norm(dim=0).max())
        cut, edge, top = (float(value) for value in (theta[0], theta[-k], theta[-1]))
        if error <= _TOLERANCE * edge:
            return vectors[:, -k:]
        if not cut > torch.finfo(matrix.dtype).eps * top:
            return None  # C is singular, and not in a way that the subspace has caught
        block = _filtered(matrix, vectors, images, cut, _degree(error / (_TOLERANCE * edge), cut, edge, top))
    return None


def _degree(missing: float, cut: float, edge: float, top: float) -> int:
    """The degree that shrinks the error of the weakest wanted vector by the factor `missing` and some more."""
    weakest, strongest = (math.acosh(max(2.0 * value / cut - 1.0, 1.0 + 1e-6)) for value in (edge, top))
    safe = _LOG_RATIO / max(strongest - weakest, _LOG_RATIO / _MAX_DEGREE)
    return max(2, min(math.ceil(math.log(20.0 * missing) / weakest), int(safe)))


def _filtered(matrix: Tensor, block: Tensor, image: Tensor, cut: float, degree: int) -> Tensor:
    """T_degree(2 C / cut - 1) @ block by the three-term recurrence; image is C @ block."""
    before, now = block, (2.0 / cut) * image - block
    for _ in range(degree - 1):
        before, now = now, torch.addmm(before, matrix, now, beta=-1.0, alpha=4.0 / cut).sub_(now, alpha=2.0)
    return now
