"""Factorisations W ~ up @ core @ down from which methods take their starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg.svd import float64_device, numerical_rank, result_dtype, top_svd

_PINV_RCOND = 1e-6


class ThreeFactors(NamedTuple):
    """up (m, r), core (r, r), down (r, n)."""

    up: Tensor
    core: Tensor
    down: Tensor


def usable_svd(
    weight: Tensor, k: int, *, method: str = "auto", niter: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of W, at most k and only those above rounding: U (m, j), S (j,), Vh (j, n).

    1 <= j <= min(k, rank): along a direction with sigma = 0 a factor pair would never get a gradient. A zero matrix
    gives one triplet with S = 0. The options are those of `top_svd`, and so are dtype, signs and errors; k may exceed
    min(m, n).
    """
    u, s, vh = top_svd(weight, min(k, *weight.shape), method=method, niter=niter, seed=seed)
    usable = max(1, numerical_rank(s, *weight.shape))
    return u[:, :usable], s[:usable], vh[:usable]


def row_weighted_svd(
    weight: Tensor,
    importance: Tensor,
    k: int,
    *,
    eps: float = 1e-5,
    method: str = "auto",
    niter: int = 8,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-k approximation of W where row i counts w_i: it minimises || diag(w) (W - L) ||_F.

        diag(w) W ~ U diag(S) V^T,        L = diag(1 / (w + eps)) U diag(S) V^T

    The minimum is the tail of S, up to the eps that keeps rows of small weight bounded; rows of weight 0 stay 0.

    Args:
        weight: W, (m, n), any real floating dtype.
        importance: w, (m,), finite and not negative.
        k: number of triplets; fewer come back where diag(w) W has a smaller rank, as in `usable_svd`.
        eps: added to w where it divides.
        method, niter, seed: those of `top_svd`; method="torch" is torch.svd_lowrank(q=k, niter=niter) instead, without
            oversampling and from torch's global generator.

    Returns:
        diag(1 / (w + eps)) U (m, j), S (j,) descending, V^T (j, n), with the dtype rules of `top_svd`.

    Raises:
        UserError: w is of another length or has an entry that is negative or not finite; and as `top_svd`.
    """
    m, n = weight.shape
    w = importance.detach().to(weight.device, result_dtype(weight))
    if w.shape != (m,) or not bool((torch.isfinite(w) & (w >= 0)).all()):
        raise UserError(f"the rows of a {m}x{n} matrix need {m} finite weights of at least 0.")
    scaled = weight.detach().to(w.dtype) * w[:, None]
    if method == "torch":
        u, s, v = torch.svd_lowrank(scaled, q=min(k, m, n), niter=niter)
        vh = v.T
    else:
        u, s, vh = usable_svd(scaled, k, method=method, niter=niter, seed=seed)
    # of a row of zeros U holds rounding noise, which 1 / eps would blow up
    up = torch.where(w[:, None] > 0, u / (w[:, None] + eps), 0.0)
    return up, s, vh


def nystrom(weight: Tensor, r: int, *, pinv: bool = True) -> ThreeFactors:
    """Nystrom's approximation from the leading corner: W ~ W[:, :r] C W[:r, :], C the inverse of W[:r, :r].

    Nothing is factorised but the r x r corner. Where that is invertible, the product has the first r rows and columns
    of W, and all of W if W has rank r.

    Args:
        weight: W, (m, n), any real floating dtype.
        r: size of the corner, 1 <= r <= min(m, n).
        pinv: the pseudo-inverse of the corner, computed in float64 and cut at 1e-6 of its largest singular value. False
            leaves the corner as it is, without inverse, as NLoRA's official code does; the product is then no
            approximation of W but a small cubic form in its entries.

    Returns:
        Detached copies, float64 for a float64 weight and float32 for every other.

    Raises:
        UserError: r out of range, or an entry that is not finite.
    """
    m, n = weight.shape
    if not 1 <= r <= min(m, n):
        raise UserError(f"a corner of size {r} was asked of a {m}x{n} matrix: ask for at most {min(m, n)}.")
    matrix = weight.detach().to(result_dtype(weight))
    up, down = matrix[:, :r].clone(), matrix[:r].clone()
    if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise UserError(f"the {m}x{n} matrix holds NaN or infinite entries: check where it comes from.")
    core = down[:, :r].clone()
    if pinv:
        exact = core.to(float64_device(core.device), torch.float64)
        core = torch.linalg.pinv(exact, rtol=_PINV_RCOND).to(core)
    return ThreeFactors(up, core, down)
