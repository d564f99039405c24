"""Algebra on factor pairs: a matrix delta = up @ down, up (m, r) and down (r, n), that is never formed.

All functions compute in float64 whatever the dtype of the factors. They are thin, so this is cheap; it is also what
keeps a difference of two nearly equal products meaningful, and neither autocast nor TF32 touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg.svd import canonical_signs, float64_device, result_dtype

Pair = tuple[Tensor, Tensor]
# part of delta, in units of the result's eps, that the rounding of the stored factors hides anyway
_ROUNDING = 4.0


@dataclass(frozen=True, eq=False)
class Compressed:
    """A truncated factor pair: up (m, rank), down (rank, n); error = ||delta - up @ down||_F / ||delta||_F."""

    up: Tensor
    down: Tensor
    rank: int
    error: float


def concatenate(pairs: Sequence[Pair]) -> Pair:
    """One pair for a sum of products: sum_i up_i @ down_i = [up_1, up_2, ...] @ [down_1; down_2; ...].

    Exact, differentiable, O((m + n) sum r_i); the dtype is torch's promotion of all factors.

    Raises:
        UserError: no pairs, or pairs whose products differ in shape.
    """
    if not pairs:
        raise UserError("There is no factor pair to add up; give at least one.")
    shapes = [_check_shapes(up, down) for up, down in pairs]
    if len(set(shapes)) > 1:
        found = ", ".join(f"{m}x{n}" for m, n in shapes)
        raise UserError(f"Factor pairs can only be added when their products have one shape; these are {found}.")
    return torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs], dim=0)


def inner(p: Pair, q: Pair) -> float:
    """Frobenius inner product <U1 D1, U2 D2> = sum((U1^T U2) * (D1 D2^T)), O((m + n) r1 r2).

    Its absolute error is about 1e-16 ||U1|| ||D1|| ||U2|| ||D2||: for the norm of a difference use `norm`, which does
    not square it.

    Raises:
        UserError: malformed pair, or products of different shapes.
    """
    (up1, down1), (up2, down2) = _exact(p), _exact(q)
    if (up1.shape[0], down1.shape[1]) != (up2.shape[0], down2.shape[1]):
        raise UserError(
            f"The inner product needs two products of one shape, but they are {up1.shape[0]}x{down1.shape[1]} and "
            f"{up2.shape[0]}x{down2.shape[1]}."
        )
    return float(((up1.T @ up2) * (down1 @ down2.T)).sum())


def norm(p: Pair) -> float:
    """||up @ down||_F = ||R_up R_down^T||_F with up = Q_up R_up, down^T = Q_down R_down; O((m + n) r^2).

    The absolute error is about 1e-16 ||up|| ||down||, where sqrt(inner(p, p)) would have 1e-8 of it: a pair that holds
    a difference of near-equal products keeps 8 digits more.

    Raises:
        UserError: malformed pair.
    """
    return float(torch.linalg.matrix_norm(_core(*_exact(p))))


def singular_values(p: Pair) -> Tensor:
    """Singular values of up @ down, descending, (min(m, n, r),); O((m + n) r^2 + r^3).

    float64 when a factor is float64, else float32.

    Raises:
        UserError: malformed pair.
    """
    return torch.linalg.svdvals(_core(*_exact(p))).to(device=p[0].device, dtype=result_dtype(*p))


def relative_error(p: Pair, q: Pair) -> float:
    """||p - q||_F / ||p||_F by QR, hence good down to about 1e-15; O((m + n) (r1 + r2)^2).

    p = 0 gives 0 when q = 0 too and infinity otherwise.

    Raises:
        UserError: malformed pair, or products of different shapes.
    """
    (up1, down1), (up2, down2) = _exact(p), _exact(q)
    gap, size = norm(concatenate([(up1, down1), (-up2, down2)])), norm((up1, down1))
    if size == 0.0:
        return 0.0 if gap == 0.0 else float("inf")
    return gap / size


def compress(up: Tensor, down: Tensor, rank: int | None = None, tol: float | None = None) -> Compressed:
    """The best approximation of delta = up @ down by a smaller rank (Eckart-Young), as balanced factors.

    up = Q_u R_u, down^T = Q_d R_d (QR) and R_u R_d^T = P S T^T (SVD) give delta = (Q_u P) S (Q_d T)^T; the result is
    up = (Q_u P) sqrt(S), down = sqrt(S) (Q_d T)^T with the signs of `canonical_signs`. O((m + n) r^2 + r^3).

    Args:
        up: (m, r). down: (r, n).
        rank: upper bound of the result's rank, >= 1. None: no bound.
        tol: the smallest rank whose relative Frobenius error is at most tol, within `rank`. None: drop numerical zeros
            only, that is a tail below 4 eps ||delta||_F (eps of the result) or below the rounding of this computation,
            max(m, n) 2^-52 ||up||_F ||down||_F.

    Returns:
        `Compressed`, detached, on up's device, float64 when a factor is float64, else float32. Its rank can be less
        than asked for, and is 0 (factors (m, 0) and (0, n)) for a zero delta. `error` is
        sqrt(sum of the dropped sigma^2) / ||delta||_F, and 0.0 when only numerical zeros were dropped.

    Raises:
        UserError: malformed or non-finite factors, rank < 1 or tol outside [0, 1].
    """
    if rank is not None and rank < 1:
        raise UserError(f"A factor pair cannot be compressed to rank {rank}; the rank must be 1 or more.")
    if tol is not None and not 0.0 <= tol <= 1.0:
        raise UserError(f"The tolerance of a compression is {tol}; it is a relative error and must lie in [0, 1].")
    up64, down64 = _exact((up, down))
    left, right = torch.linalg.qr(up64), torch.linalg.qr(down64.T)
    p, s, th = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)

    # tails[i]: what is lost when i triplets are kept
    tails = torch.cat((s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1))).sqrt()
    total = float(tails[0])
    dtype = result_dtype(up, down)
    noise = max(up.shape[0], down.shape[1]) * torch.finfo(torch.float64).eps * float(up64.norm() * down64.norm())
    zero = max(_ROUNDING * torch.finfo(dtype).eps * total, noise)
    limit = zero if tol is None else max(zero, tol * total)
    kept = int((tails > limit).sum())
    if rank is not None:
        kept = min(kept, rank)
    lost = float(tails[kept])

    root = s[:kept].sqrt()
    balanced_up, balanced_down = (left.Q @ p[:, :kept]) * root, root[:, None] * (th[:kept] @ right.Q.T)
    balanced_up, balanced_down = canonical_signs(balanced_up.to(dtype), balanced_down.to(dtype))
    return Compressed(
        up=balanced_up.to(up.device).contiguous(),
        down=balanced_down.to(up.device).contiguous(),
        rank=kept,
        error=0.0 if lost <= zero else lost / total,
    )


def pad(up: Tensor, down: Tensor, rank: int) -> Pair:
    """The same product with `rank` >= r: zero columns behind up (m, rank) and zero rows below down (rank, n).

    Raises:
        UserError: malformed pair, or rank smaller than the pair's (that needs `compress`).
    """
    m, n = _check_shapes(up, down)
    missing = rank - up.shape[1]
    if missing < 0:
        raise UserError(f"A factor pair of rank {up.shape[1]} cannot be padded to rank {rank}; compress it instead.")
    return torch.cat((up, up.new_zeros(m, missing)), dim=1), torch.cat((down, down.new_zeros(missing, n)), dim=0)


def _core(up: Tensor, down: Tensor) -> Tensor:
    """R_up R_down^T, (min(m, r), min(n, r)): same singular values as up @ down."""
    return torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T


def _exact(pair: Pair) -> Pair:
    """The checked pair, detached and in float64."""
    up, down = pair
    _check_shapes(up, down)
    place = float64_device(up.device)
    up, down = (factor.detach().to(device=place, dtype=torch.float64) for factor in (up, down))
    if not (bool(torch.isfinite(up).all()) and bool(torch.isfinite(down).all())):
        raise UserError(
            f"A factor of the pair {tuple(up.shape)} @ {tuple(down.shape)} holds NaN or infinite entries; "
            "check the training that produced it."
        )
    return up, down


def _check_shapes(up: Tensor, down: Tensor) -> tuple[int, int]:
    """(m, n) of up @ down, once both are real matrices that can be multiplied."""
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise UserError(
            f"A factor pair is up (m, r) and down (r, n), but the shapes are {tuple(up.shape)} and {tuple(down.shape)}."
        )
    if not (up.is_floating_point() and down.is_floating_point()):
        raise UserError(f"A factor pair holds real floating-point numbers, not {up.dtype} and {down.dtype}.")
    return up.shape[0], down.shape[1]
