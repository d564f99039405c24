"""What becomes of the part of a gradient that lies outside its subspace.

"drop" leaves it out, as GaLore does. `Scaled` is Fira's residual, `Feedback` keeps it for the following gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg.quantise import Quantised, dequantise_rows, quantise_rows
from loratlas.optim.projector import Bases

FEEDBACK = {"fp": None, "int8": 8, "int4": 4}
RESIDUAL_MODES = ("official", "paper")
SCALINGS = ("column", "matrix")
_NORM_EPS = 1e-8
_TINY = 1e-12


class Scaled:
    """Fira's residual: what the subspace leaves out, scaled as Adam has scaled what lies inside (arXiv 2410.01623).

        phi = ||N_j|| / (||R_j|| + 1e-8)          j along the dimension that is not projected, or over all of the matrix
        S   = (G - alpha back(R)) phi             mode "official";   (G - back(R)) phi in mode "paper"
        l   = max(||S|| / (s + 1e-8) / gamma, 1);  S <- S / l;  s <- ||S||
        W  <- W - size (alpha back(N) + S)        mode "official";   size alpha (back(N) + S) in mode "paper"

    State: "residual_norm", s, a 0-dim tensor. After a step whose residual was 0 the limiter starts again; the official
    code would hold the residual at 0 for thousands of steps.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.official = group["residual_mode"] == "official"
        self.alpha, self.gamma = float(group["scale"]), float(group["gamma"])
        self.by_column = group["scaling"] == "column"

    def apply(
        self,
        weights: list[Tensor],
        matrices: list[Tensor],
        reduced: list[Tensor],
        steps: list[Tensor],
        bases: list[Bases],
        states: list[dict[str, Any]],
        size: float,
    ) -> None:
        """The whole step of matrices of one shape: along the subspace and outside of it."""
        inside = self.alpha if self.official else 1.0
        residuals = []
        for matrix, r, n, basis in zip(matrices, reduced, steps, bases, strict=True):
            outside = basis.add_back(matrix.clone(), r, -inside)
            residuals.append(outside.mul_(self._ratio(r, n, basis)))
        factors = self._limit(residuals, states)
        torch._foreach_mul_(residuals, list(factors.unbind()))
        outer = size if self.official else size * self.alpha
        for weight, n, basis, outside in zip(weights, steps, bases, residuals, strict=True):
            basis.add_back(weight, n, -size * self.alpha)
            weight.add_(outside, alpha=-outer)

    def _ratio(self, reduced: Tensor, step: Tensor, bases: Bases) -> Tensor:
        if not self.by_column:
            return step.norm() / (reduced.norm() + _NORM_EPS)
        dim = 0 if bases.left is not None else 1
        above, below = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (step, reduced))
        return above / (below + _NORM_EPS)

    def _limit(self, residuals: list[Tensor], states: list[dict[str, Any]]) -> Tensor:
        """1 / l of every residual; the norms after limiting go into the states."""
        norms = torch.stack(torch._foreach_norm(residuals))
        before = torch.stack(
            [state.get("residual_norm", norm.new_zeros(())) for state, norm in zip(states, norms, strict=True)]
        )
        limit = (norms / (before + _NORM_EPS) / self.gamma).clamp(min=1)
        limit = torch.where(before > _TINY, limit, torch.ones_like(limit))
        for state, norm in zip(states, norms / limit, strict=True):
            state["residual_norm"] = norm.clone()
        return 1 / limit


class Feedback:
    """Error feedback: A = G + E enters the projection instead of G, and E <- A - back(R) is kept.

    So back(R) + E_new = G + E_old: nothing of a gradient is lost, it comes later. E is as large as the matrix; "int8"
    and "int4" keep it in that many bits, rounded row by row.

    State: "error", or "error_codes" (uint8), "error_low" and "error_step".
    """

    def __init__(self, kind: str) -> None:
        if kind not in FEEDBACK:
            raise UserError(
                f"error_feedback must be None, 'fp', 'int8' or 'int4', but it is {kind!r}.", field="error_feedback"
            )
        self.bits = FEEDBACK[kind]

    def with_error(self, matrix: Tensor, state: dict[str, Any]) -> Tensor:
        """A = G + E, a new tensor."""
        if self.bits is None:
            return matrix + state["error"] if "error" in state else matrix.clone()
        if "error_codes" not in state:
            return matrix.clone()
        kept = Quantised(*(state[f"error_{part}"] for part in Quantised._fields))
        return dequantise_rows(kept, self.bits, matrix.shape[1]).add_(matrix)

    def keep(self, matrix: Tensor, reduced: Tensor, bases: Bases, state: dict[str, Any]) -> None:
        """E = A - back(R), in the memory of A."""
        error = bases.add_back(matrix, reduced, -1.0)
        if self.bits is None:
            state["error"] = error
        else:
            kept = quantise_rows(error, self.bits)
            state.update({f"error_{part}": value for part, value in kept._asdict().items()})
