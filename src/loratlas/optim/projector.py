"""Projection of gradient matrices on low-rank subspaces that are chosen anew every T steps.

    right side (tall and square matrices):  R = G P^T,  back(N) = N P,   P (r, in)
    left side (wide matrices):              R = P G,    back(N) = P^T N, P (r, out)
    full:                                   R = P_l G P_r^T,  back(N) = P_l^T N P_r

with orthonormal rows in P. They are the leading singular vectors of the gradient (basis "svd"), or those r vectors of a
fixed orthonormal set (`linalg.dct`) with which the gradient has the largest products: then r indices are kept instead
of P, and a vector that is chosen again can be told from a new one.

State, per parameter: "left" or "right", (r, n) of the moments' dtype, or "left_index" or "right_index", (r,) int32,
ascending. "full" has both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratlas.engine.sharded import from_rank0
from loratlas.errors import UserError
from loratlas.linalg import dct
from loratlas.linalg.subspace import leading_directions
from loratlas.linalg.svd import METHODS, result_dtype

BASES = ("svd", *dct.SETS)
SIDES = ("std", "reverse_std", "left", "right", "full")
EVALUATIONS = ("auto", "matmul", "fft")
NAMES = ("left", "right")  # by the dimension that shrinks


class Carried(NamedTuple):
    """For new basis vectors along `dim` of R: number of the same vector in the old basis, and whether it was there."""

    dim: int
    source: Tensor
    kept: Tensor


class Bases(NamedTuple):
    """P_l (r, out) and P_r (r, in) of one matrix; None where a side is not projected."""

    left: Tensor | None
    right: Tensor | None

    def down(self, matrix: Tensor) -> Tensor:
        """R, the coordinates of a matrix in the subspace."""
        if self.left is not None:
            matrix = self.left @ matrix
        return matrix if self.right is None else matrix @ self.right.T

    def add_back(self, matrix: Tensor, reduced: Tensor, alpha: float) -> Tensor:
        """matrix + alpha back(reduced), written into the matrix; no full-size temporary where the dtypes agree."""
        if self.left is None:
            assert self.right is not None
            up, low = reduced, self.right
        else:
            up, low = self.left.T, reduced if self.right is None else reduced @ self.right
        if matrix.dtype == reduced.dtype:
            return matrix.addmm_(up, low, alpha=alpha)
        return matrix.add_(up @ low, alpha=alpha)


@dataclass(frozen=True)
class Projector:
    """How the matrices of a parameter group are projected.

    Attributes:
        rank: r, cut to the smaller side of a matrix.
        basis: "svd", "dct2", "dct3" or "random".
        proj_type: "std" shrinks the smaller dimension, "reverse_std" the other, "full" both.
        select_norm: a vector's score is the p-norm of the products with it; -p multiplies it with the vector's own
            p-norm ("theoretical similarity" in the official code).
        evaluation: how products with a DCT set are computed.
        svd_method: as for `linalg.svd.top_svd`.
        seed: of basis "random" and of randomised SVDs.
    """

    rank: int
    basis: str = "svd"
    proj_type: str = "std"
    select_norm: int = 1
    evaluation: str = "auto"
    svd_method: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("basis", BASES),
            ("proj_type", SIDES),
            ("evaluation", EVALUATIONS),
            ("svd_method", METHODS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, but it is {value!r}.", field=name)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"the rank must be an integer of at least 1, but it is {self.rank!r}.", field="rank")
        if self.select_norm not in (1, 2, -1, -2):
            raise UserError(f"select_norm must be 1, 2, -1 or -2, but it is {self.select_norm!r}.", field="select_norm")
        if self.basis == "random" and self.evaluation == "fft":
            raise UserError("a random basis has no fast transform: set evaluation='matmul'.", field="evaluation")

    def sides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions of a matrix of that shape that shrink to r."""
        wide = shape[0] < shape[1]
        if self.proj_type == "full":
            return 0, 1
        if self.proj_type in NAMES:
            return (NAMES.index(self.proj_type),)
        return (0,) if wide == (self.proj_type == "std") else (1,)

    # ------------------------------------------------------------------------------------------------- choosing

    def refresh(self, states: list[dict[str, Any]], matrices: list[Tensor]) -> list[list[Carried]]:
        """Choose the bases of matrices of one shape anew and write them into their states, as rank 0 has them.

        Returns:
            For every matrix what of its old basis is in the new one, a side each; nothing on the first call and for
            basis "svd".
        """
        carried: list[list[Carried]] = [[] for _ in matrices]
        for dim in self.sides(tuple(matrices[0].shape)):
            if self.basis == "svd":
                for state, matrix in zip(states, matrices, strict=True):
                    state[NAMES[dim]] = from_rank0(self.directions(matrix, dim)).to(matrix.dtype)
                continue
            name = f"{NAMES[dim]}_index"
            index = from_rank0(self.choose(matrices, dim))
            if name in states[0]:
                old = torch.stack([state[name] for state in states]).long()
                source, kept = _match(old, index, matrices[0].shape[dim])
                for each, j, kept_j in zip(carried, source, kept, strict=True):
                    each.append(Carried(dim, j, kept_j))
            for state, row in zip(states, index.to(torch.int32), strict=True):
                state[name] = row.clone()
        return carried

    def directions(self, matrix: Tensor, dim: int) -> Tensor:
        """Leading singular vectors of one matrix along `dim`, (r, n)."""
        rank = min(self.rank, *matrix.shape)
        return leading_directions(matrix, rank, dim, self.svd_method, self.seed)

    def choose(self, matrices: list[Tensor], dim: int) -> Tensor:
        """Indices (count, r), ascending, of the vectors with the largest scores; the lower index wins a tie."""
        rank = min(self.rank, *matrices[0].shape)
        scores = torch.stack([self._scores(matrix, dim) for matrix in matrices])
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :rank].sort(dim=1).values

    def _scores(self, matrix: Tensor, dim: int) -> Tensor:
        power = abs(self.select_norm)
        exact = matrix.to(result_dtype(matrix))  # there is no FFT in half precision
        scores = dct.norms(exact, self.basis, dim, power, self.seed, self.evaluation)
        if self.select_norm < 0:
            n = scores.shape[0]
            every = torch.arange(n, device=matrix.device)
            own = dct.vectors(self.basis, n, every, self.seed, exact.dtype)
            scores = scores * torch.linalg.vector_norm(own, power, dim=1)
        return scores

    # ------------------------------------------------------------------------------------------------- applying

    def bases(self, state: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Bases:
        """The bases in force of a parameter of that shape."""
        found: list[Tensor | None] = [None, None]
        for dim in self.sides(shape):
            if self.basis == "svd":
                found[dim] = state[NAMES[dim]]
            else:
                index = state[f"{NAMES[dim]}_index"].long()
                found[dim] = dct.vectors(self.basis, shape[dim], index, self.seed, dtype)
        return Bases(*found)


def _match(old: Tensor, new: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Where in `old` (count, r) each of `new` (count, r) stands, and whether it does; both name slices of n."""
    place = old.new_full((old.shape[0], n), -1)
    place.scatter_(1, old, torch.arange(old.shape[1], device=old.device).expand_as(old))
    found = place.gather(1, new)
    return found.clamp(min=0), found >= 0
