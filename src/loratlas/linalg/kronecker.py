"""Sums of Kronecker products: the SVD of Van Loan and Pitsianis (1993), and how many of its terms are worth keeping.

    W ~ sum_k A_k (x) B_k,   W (m p, n q), A_k (m, n), B_k (p, q),   block (i, j) of A (x) B is a_ij B

R(W), (m n, p q), has the blocks of W as rows: R(A (x) B) = vec(A) vec(B)^T, so the SVD of R(W) gives the best sum of K
terms in the Frobenius norm, and its singular values the error of leaving the rest out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg.svd import top_svd


class Shape(NamedTuple):
    """Sizes of the factors of an (m p, n q) matrix: A is (m, n), B is (p, q)."""

    m: int
    p: int
    n: int
    q: int


def balanced_shape(out: int, n_in: int) -> Shape:
    """The split with the fewest entries m n + p q; ties go to the squarest (m near p, n near q), then to larger A.

    A prime size splits as 1 times itself only: then the terms are ordinary rank-one or row-wise ones.
    """
    splits = [Shape(m, out // m, n, n_in // n) for m in _divisors(out) for n in _divisors(n_in)]

    def cost(s: Shape) -> tuple[int, float, int]:
        return s.m * s.n + s.p * s.q, max(s.m, s.p) / min(s.m, s.p) * max(s.n, s.q) / min(s.n, s.q), -s.m * s.n

    return min(splits, key=cost)


def shape_for(out: int, n_in: int, m: int, n: int) -> Shape:
    """The split with A of the given shape (m, n).

    Raises:
        UserError: m does not divide out, or n does not divide n_in.
    """
    if m < 1 or n < 1 or out % m or n_in % n:
        raise UserError(
            f"a {out} x {n_in} weight has no Kronecker factor of shape {m} x {n}: its sizes must divide {out} and "
            f"{n_in}."
        )
    return Shape(m, out // m, n, n_in // n)


def rearranged(matrix: Tensor, shape: Shape) -> Tensor:
    """R(W), (m n, p q): row (i, j) is block (i, j) of W (m p, n q), row by row."""
    m, p, n, q = shape
    return matrix.reshape(m, p, n, q).transpose(1, 2).reshape(m * n, p * q)


def kronecker_svd(
    matrix: Tensor, shape: Shape, k: int, *, method: str = "auto", niter: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(U (k, m, n), S (k,), V (k, p, q)) with W ~ sum_k S_k U_k (x) V_k; the options are those of `top_svd`."""
    u, s, vh = top_svd(rearranged(matrix, shape), k, method=method, niter=niter, seed=seed)
    return u.T.reshape(k, shape.m, shape.n), s, vh.reshape(k, shape.p, shape.q)


def kronecker_sum(a: Tensor, b: Tensor) -> Tensor:
    """sum_k A_k (x) B_k, (m p, n q), of a (k, m, n) and b (k, p, q)."""
    (_, m, n), (_, p, q) = a.shape, b.shape
    return torch.einsum("kmn,kpq->mpnq", a, b).reshape(m * p, n * q)


def apply_kronecker_sum(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_k (A_k (x) B_k) x for rows x (..., n q): (..., m p), as two products and without the (m p, n q) matrix.

    (A (x) B) vec(X) = vec(A X B^T) with X = x as (n, q). The factor that leaves less to do goes first. Both products
    are of plain matrices: the batched ones of torch round differently with and without gradients.
    """
    (k, m, n), (_, p, q) = a.shape, b.shape
    rows = x.reshape(-1, n, q)
    if n * p * (q + m) <= m * q * (n + p):
        inner = rows.reshape(-1, q) @ b.reshape(k * p, q).T  # X B^T, (t n, k p)
        inner = inner.view(-1, n, k, p).permute(0, 3, 2, 1).reshape(-1, k * n)
        y = (inner @ a.transpose(1, 2).reshape(k * n, m)).view(-1, p, m).transpose(1, 2)
    else:
        inner = rows.transpose(1, 2).reshape(-1, n) @ a.reshape(k * m, n).T  # (A X)^T, (t q, k m)
        inner = inner.view(-1, q, k, m).permute(0, 3, 2, 1).reshape(-1, k * q)
        y = (inner @ b.transpose(1, 2).reshape(k * q, p)).view(-1, m, p)
    return y.reshape(*x.shape[:-1], m * p)


def sum_is_cheaper(rows: int, a: Tensor, b: Tensor) -> bool:
    """Whether a training step over so many rows of x takes less with the sum as a matrix than by the two products.

    The step multiplies the matrix with x once, in the gradient (see `engine.dense`). The two products are done three
    times and their wide result is reordered each time, which makes them count eight times; making the matrix and going
    back through it takes as long as 64 rows a term. Measured in fp32 and bf16 on a CPU, 384 to 2048 wide.
    """
    (k, m, n), (_, p, q) = a.shape, b.shape
    return m * p * n * q * (rows + 64 * k) <= 8 * rows * k * _multiplications(m, p, n, q)


def _multiplications(m: int, p: int, n: int, q: int) -> int:
    """Of one term and one row, in the better order."""
    return min(n * p * (q + m), m * q * (n + p))


def terms_by_energy(s: Tensor, total: float, tau: float) -> int:
    """The smallest r with sum_(k <= r) s_k^2 >= tau total; all of `s`, (K,) descending, if they do not reach it."""
    energy = s.double().square().cumsum(0)
    return min(int((energy < tau * total).sum()) + 1, len(s))


def terms_by_elbow(s: Tensor) -> int:
    """The r whose point (r, s_r) lies farthest from the chord between the first and the last point of `s`, (K,)."""
    if len(s) < 3:
        return len(s)
    place = torch.linspace(0, 1, len(s), dtype=torch.float64, device=s.device)
    height = (s.double() - s[-1]) / (s[0] - s[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    # the chord runs from (0, 1) to (1, 0) after scaling, so the distance is |place + height - 1| / sqrt(2)
    return int((place + height - 1).abs().argmax()) + 1


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
