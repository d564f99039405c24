"""Dividing ranks among weights by how concentrated their spectra are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratlas.linalg.svd import result_dtype, top_svd


def energy(weight: Tensor, k: int, *, method: str = "auto", niter: int = 8, seed: int = 0) -> float:
    """sum_{i <= k} sigma_i^2 / ||W||_F^2 in [0, 1]: how much of W its k leading directions hold; 1 for W = 0.

    k may exceed min(m, n); the other arguments are those of `top_svd`.
    """
    k = min(k, *weight.shape)
    total = float(torch.linalg.matrix_norm(weight.to(result_dtype(weight)).double()) ** 2)
    if total == 0.0:
        return 1.0
    return float(top_svd(weight, k, method=method, niter=niter, seed=seed)[1].double().square().sum()) / total


def spread_ranks(energies: Sequence[float], low: int, high: int) -> list[int]:
    """A rank for every weight: the more concentrated its spectrum, the smaller.

    The weights, sorted by falling energy, are cut into as many groups as there are ranks from `low` to `high`, as equal
    in size as they can be while the sum stays len(energies) (low + high) / 2. Ties go by position.
    """
    count, choices = len(energies), high - low + 1
    order = sorted(range(count), key=lambda i: -energies[i])
    ranks = [0] * count
    for place, index in enumerate(order):
        # the middle of a place never falls on a border between groups, as `choices` is odd: that keeps the sum
        ranks[index] = low + (2 * place + 1) * choices // (2 * count)
    return ranks
