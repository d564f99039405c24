"""Matrices as tensor rings (arXiv 2501.08727): small cores, joined in a ring by traces.

    T[i, j]     = trace(A_1[i_1, j_1] ... A_D[i_D, j_D])                   A_d (I_d, I_d, R, R): a tensor-ring matrix
    Delta[i, j] = trace(B_1[i_1] ... B_D[i_D] C_1[j_1] ... C_E[j_E])       B_d (O_d, R, R),  C_d (I_d, R, R)

An index is split with its first factor fastest: i = i_1 + i_2 I_1 + i_3 I_1 I_2 + ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def factorise(n: int, count: int) -> list[int]:
    """At most `count` factors of n, all above 1, near each other, in rising order.

    Prime factors, largest first, each go to the factor that is smallest so far. Factors may be fewer for small n.
    """
    primes, rest, p = [], n, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p = p + 1 if p * p <= rest else max(rest, p + 1)
    factors = [1] * count
    for prime in sorted(primes, reverse=True):
        factors[factors.index(min(factors))] *= prime
    return sorted(factor for factor in factors if factor > 1) or [1]


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """T (prod I_d, prod I_d) of cores A_d (I_d, I_d, R, R)."""
    if len(cores) == 1:
        return torch.einsum("ijrr->ij", cores[0])
    product = cores[0]
    for core in cores[1:-1]:
        i, j = product.shape[0] * core.shape[0], product.shape[1] * core.shape[1]
        joined = torch.einsum("ijrs,klst->kiljrt", product, core)
        product = joined.reshape(i, j, *joined.shape[4:])
    # the ring closes with the last core: no matrix of T's size for each of its R^2 bonds
    closed = torch.einsum("ijrs,klsr->kilj", product, cores[-1])
    return closed.reshape(closed.shape[0] * closed.shape[1], -1)


def chain(cores: Sequence[Tensor]) -> Tensor:
    """(prod I_d, R, R): the products of the cores' matrices, for cores (I_d, R, R)."""
    product = cores[0]
    for core in cores[1:]:
        joined = torch.einsum("irs,kst->kirt", product, core)
        product = joined.reshape(-1, *joined.shape[2:])
    return product


def ring_factors(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(up (prod O_d, R^2), down (R^2, prod I_d)) with Delta = up @ down."""
    up, down = chain(ups), chain(downs)
    return up.flatten(1), down.mT.flatten(1).T


def identity_cores(sizes: Sequence[int], rank: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Cores of T = I, fp64: A_d[:, :, r, s] = I / R for all r, s (Proposition 1).

    With a generator A_d[i, i] = G_d^-1 (ones / R) G_(d+1) instead, the G random and in a ring: T is I as well, but the
    R^2 slices differ. Equal ones have equal gradients, so that they never part and the ring is worth no more than one
    of R = 1.
    """
    ones = torch.full((rank, rank), 1.0 / rank, dtype=torch.float64)
    turns = [torch.eye(rank, dtype=torch.float64) for _ in sizes]
    if generator is not None:
        drawn = [torch.randn(rank, rank, generator=generator, dtype=torch.float64) for _ in sizes]
        turns = [torch.linalg.qr(g).Q * (1.0 + 0.5 * torch.arange(rank) / rank) for g in drawn]
    cores = []
    for d, size in enumerate(sizes):
        inner = torch.linalg.solve(turns[d], ones @ turns[(d + 1) % len(sizes)])
        cores.append(torch.eye(size, dtype=torch.float64)[:, :, None, None] * inner)
    return cores


def identity_distance(cores: Sequence[Tensor]) -> Tensor:
    """R_I = sum_d sum_rs || A_d[:, :, r, s] - I / R ||_F."""
    return sum((_distance(core, core.shape[-1]) for core in cores), cores[0].new_zeros(()))


def orthogonality_distance(cores: Sequence[Tensor]) -> Tensor:
    """R_O: as R_I for the cores of T T^T, sum_l A_d[i, l] (x) A_d[j, l], of rank R^2; 0 at the start."""
    squares = [
        torch.einsum("ilrs,jltu->ijrtsu", core, core).reshape(*core.shape[:2], core.shape[2] ** 2, core.shape[3] ** 2)
        for core in cores
    ]
    return identity_distance(squares)


def _distance(core: Tensor, rank: int) -> Tensor:
    eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)[:, :, None, None]
    return torch.linalg.vector_norm((core - eye / rank).flatten(0, 1), dim=0).sum()


def residual_std(size: int, rank: int) -> float:
    """sqrt(n_out) / n_in with n_out = R and n_in = size R, the constant taken as 1."""
    return math.sqrt(rank) / (size * rank)
