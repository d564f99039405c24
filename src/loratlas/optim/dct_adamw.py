"""DCT-AdamW (arXiv 2505.17967): AdamW in a subspace of discrete cosines, chosen anew at every step without an SVD.

    I <- the r vectors of a fixed orthonormal set Q with the largest products |G q_j|      every T steps
    A = G (+ E, what earlier steps left out);  R = A Q_I^T
    moments of vectors that stay go with them, those of new ones start at 0
    W <- (1 - lr wd) W - lr R_hat Q_I,  R_hat = torch's AdamW on R

Follows the official code (IST-DASLab/ISTA-DASLab-Optimizers) in schedule and formulas. The carry-over matches indices,
exactly, as products of vectors of one orthonormal set are 0 or 1. State of an m x n matrix, m <= n: 2 n r numbers and r
indices; error feedback adds as many numbers as the matrix has.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from loratlas.engine.config import knob
from loratlas.linalg.dct import SETS
from loratlas.optim import rules
from loratlas.optim.config import SubspaceConfig
from loratlas.optim.projector import EVALUATIONS
from loratlas.optim.residual import FEEDBACK
from loratlas.optim.rules import Group
from loratlas.optim.subspace import SubspaceOptimizer

_LONGEST_FEEDBACK = 5


class DCTAdamW(SubspaceOptimizer):
    """AdamW in subspaces of a fixed orthonormal set; groups with a `rank` are projected.

        DCTAdamW([{"params": matrices, "rank": 128}, {"params": others}], lr=1e-3)

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, betas, eps, weight_decay: those of torch.optim.AdamW.
        basis: "dct2" (cosines; the official sim_type "makhoul"), "dct3" (columns of the same matrix; "matmul"),
            or "random".
        update_proj_gap: T; the subspace is chosen at the steps 1, T, 2 T, ...
        carry_moments: False leaves the moments as they are, in whatever coordinates the new subspace has.
        error_feedback: None, "fp", "int8" or "int4": see `residual.Feedback`.
        **options: defaults of the groups' other options.
    """

    rule = rules.AdamW()
    counts_from_one = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        basis: str = "dct2",
        update_proj_gap: int = 1,
        carry_moments: bool = True,
        error_feedback: str | None = None,
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": True}
        how = {"basis": basis, "update_proj_gap": update_proj_gap, "error_feedback": error_feedback}
        moments = "permute" if carry_moments else "keep"
        super().__init__(params, {**own, **how, "order": "torch", "moments": moments, **options}, layerwise)

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["rank"] and group["error_feedback"] and group["update_proj_gap"] > _LONGEST_FEEDBACK:
            warnings.warn(
                f"error feedback over {group['update_proj_gap']} steps of one subspace grows until all of it comes at "
                f"once and harms: choose update_proj_gap <= {_LONGEST_FEEDBACK}, or no error_feedback.",
                stacklevel=2,
            )


@dataclass
class DCTAdamWConfig(SubspaceConfig):
    """DCT-AdamW over a model's matrices; everything else that trains takes torch's AdamW.

        optimizer = DCTAdamWConfig(r=128).build(model, lr=1e-3)

    Source: arXiv 2505.17967.

    Raises:
        UserError: an option out of its range; in `check` and `build`, no matrix to project.
    """

    name = "dct-adamw"
    trains_base = True

    update_proj_gap: int = knob(1, "Steps from one choice of the subspace to the next.")
    basis: str = knob("dct2", "Vectors to choose from: 'dct2' (cosines), 'dct3' or 'random'.")
    carry_moments: bool = knob(True, "Moments follow the vectors that stay; False keeps them as they are.")
    error_feedback: str | None = knob(
        None, "What a step leaves out is added to the next gradient: kept in 'fp', 'int8' or 'int4'."
    )
    select_norm: int = knob(1, "Norm of the products by which vectors are chosen: 1 or 2; -1, -2: 'theoretical'.")
    evaluation: str = knob("auto", "Products by 'matmul' or 'fft'; 'auto' decides by device and size.")
    max_dim: int = knob(32000, "Matrices with a dimension of at least this are not projected.")
    betas: tuple[float, float] = knob((0.9, 0.999), "Decay of the first and the second moment.")
    eps: float = knob(1e-8, "Added to the root of the second moment.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.basis in SETS, "basis", f"one of {', '.join(SETS)}")
        self._require(self.error_feedback in (None, *FEEDBACK), "error_feedback", "None, 'fp', 'int8' or 'int4'")
        self._require(self.select_norm in (1, 2, -1, -2), "select_norm", "1, 2, -1 or -2")
        self._require(self.evaluation in EVALUATIONS, "evaluation", f"one of {', '.join(EVALUATIONS)}")
        self._require(self.max_dim >= 1, "max_dim", "at least 1")

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> SubspaceOptimizer:
        groups = self._groups(model, weight_decay, self.max_dim)
        names = ("basis", "carry_moments", "error_feedback", "select_norm", "evaluation", "betas", "eps")
        return DCTAdamW(groups, lr=lr, **self._options(*names))

    def check(self, model: nn.Module) -> None:
        self._groups(model, 0.0, self.max_dim)
