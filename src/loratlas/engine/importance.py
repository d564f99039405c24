"""Sensitivity x uncertainty scores with moving averages (AdaLoRA, arXiv 2303.10512, eqs. 8-10; SRLoRA eqs. 3-6).

    I    = |P * dL/dP|                               sensitivity of one entry
    Ibar = beta1 Ibar + (1 - beta1) I                its moving average
    Q    = beta2 Q + (1 - beta2) |I - Ibar|          uncertainty, with the Ibar just updated
    s    = Ibar * Q

The averages start at 0 and are not bias-corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratlas.engine.sharded import gather, local

CHUNK = 1 << 20  # entries of a matrix that may be there at a time


@torch.no_grad()
def update_importance(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    average: Sequence[Tensor],
    uncertainty: Sequence[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Update Ibar (`average`) and Q (`uncertainty`) in place. All lists run in parallel; one kernel a list, no loop.

    `params` and `grads` may be sharded: each rank multiplies its part, and one collective makes the products whole.
    """
    products = torch._foreach_mul([local(p) for p in params], [local(g) for g in grads])
    sensitivity = gather(products, params)
    torch._foreach_abs_(sensitivity)
    smooth_(sensitivity, average, uncertainty, beta1, beta2)


@torch.no_grad()
def smooth_(
    values: Sequence[Tensor], average: Sequence[Tensor], uncertainty: Sequence[Tensor], beta1: float, beta2: float
) -> None:
    """Take new sensitivities, entry by entry or one a module, into Ibar and Q in place; `values` is used up."""
    torch._foreach_lerp_(list(average), list(values), 1.0 - beta1)
    torch._foreach_sub_(list(values), list(average))
    torch._foreach_abs_(list(values))
    torch._foreach_lerp_(list(uncertainty), list(values), 1.0 - beta2)


def pair_scores(average_a: Tensor, uncertainty_a: Tensor, average_b: Tensor, uncertainty_b: Tensor) -> Tensor:
    """Score of each rank-one pair: S_k = mean_i s(B)_ik + mean_j s(A)_kj.

    average_a, uncertainty_a: (r, in); average_b, uncertainty_b: (out, r). Returns (r,).
    """
    return (average_b * uncertainty_b).mean(0) + (average_a * uncertainty_a).mean(1)


@torch.no_grad()
def update_sensitivity(g: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """sum_ij |delta_ij G_ij| of an update delta = up @ down and its gradient G = g^T x, in the dtype of `up`.

    Neither matrix is ever there as a whole: both are made and multiplied in chunks of rows.

    g: (tokens, out); x: (tokens, in); down: (r, in); up: (out, r).
    """
    rows = max(1, CHUNK // x.shape[1])
    total = up.new_zeros(())
    for g_rows, up_rows in zip(g.split(rows, dim=1), up.split(rows), strict=True):
        total += (up_rows @ down).mul_(g_rows.T @ x).abs_().sum()
    return total
