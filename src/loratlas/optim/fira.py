"""Fira (arXiv 2410.01623): GaLore's memory, with what lies outside of the subspace scaled back in.

    R = G P^T,  N = Adam(R)           as GaLore, no bias correction in N
    S = (G - alpha R P) phi,          phi_i = ||N_i|| / ||R_i||: how much Adam has scaled row i (column, if wide)
    ||S|| grows by gamma a step at most
    W <- W - lr_t (alpha N P + S)

Follows the official code (xichen-fy/Fira); the paper has alpha in front of both terms, and S without it:
`residual.Scaled` has both. State: GaLore's and one number a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from loratlas.engine.config import knob
from loratlas.errors import UserError
from loratlas.linalg.svd import METHODS
from loratlas.optim import rules
from loratlas.optim.config import SubspaceConfig
from loratlas.optim.projector import BASES
from loratlas.optim.residual import RESIDUAL_MODES, SCALINGS
from loratlas.optim.rules import Group
from loratlas.optim.subspace import SubspaceOptimizer
from loratlas.optim.subspace_adamw import SubspaceAdamW

_DEFAULTS = {"residual_mode": "official", "gamma": 1.01, "scaling": "column"}


class _Fira(SubspaceOptimizer):
    """Fira's defaults and checks; "alpha" of a group is the official name of its scale."""

    def __init__(self, params: Any, defaults: dict[str, Any], layerwise: bool = False) -> None:
        super().__init__(params, {**_DEFAULTS, **defaults}, layerwise)

    def add_param_group(self, param_group: Group) -> None:
        if "alpha" in param_group:
            param_group["scale"] = param_group.pop("alpha")
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        if group["residual_mode"] not in RESIDUAL_MODES:
            modes = ", ".join(RESIDUAL_MODES)
            raise UserError(
                f"residual_mode must be one of {modes}, but it is {group['residual_mode']!r}.", "residual_mode"
            )
        if group["scaling"] not in SCALINGS:
            raise UserError(f"scaling must be one of {', '.join(SCALINGS)}, but it is {group['scaling']!r}.", "scaling")
        if not group["gamma"] >= 1:
            raise UserError(f"gamma must be at least 1, but it is {group['gamma']!r}.", field="gamma")
        if group["proj_type"] == "full":
            raise UserError("Fira scales by rows or columns, so proj_type must project one side only.", "proj_type")
        super()._check(group)


class FiraAdamW(SubspaceAdamW, _Fira):
    """Fira with AdamW; groups with a `rank` are projected, with the options of `SubspaceOptimizer`.

        FiraAdamW([{"params": matrices, "rank": 128, "alpha": 0.25}, {"params": others}], lr=0.01)

    Args:
        params: parameters or groups, as for any torch optimizer; a group's "alpha" is another name of "scale".
        lr, betas, eps, weight_decay, correct_bias, order: as `galore.GaLoreAdamW`.
        residual_mode: "official" or "paper"; equal for alpha = 1.
        gamma: how much the residual's norm may grow in a step; inf for no limit.
        scaling: "column" (rows of a tall matrix), or "matrix" for one factor for all of it.
        **options: defaults of the groups' other options.
    """


class FiraRMSProp(_Fira):
    """Fira with RMSProp; beta, momentum and centered are those of `rules.RMSProp`, the rest as `FiraAdamW`."""

    rule = rules.RMSProp()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "beta": beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**own, "momentum": momentum, "centered": centered, **options}, layerwise)


OPTIMIZERS = ("adamw", "rmsprop")


@dataclass
class FiraConfig(SubspaceConfig):
    """Fira over a model's matrices: full weights, or the factors of an adapter, whichever of them train.

        optimizer = FiraConfig(r=16).build(peft_model, lr=1e-4)       # LoRA trained by Fira
        optimizer = FiraConfig(r=128, alpha=0.25).build(model, lr=0.01)

    Source: arXiv 2410.01623.

    Raises:
        UserError: an option out of its range; in `check` and `build`, no matrix to project.
    """

    name = "fira"
    trains_base = True

    r: int = knob(128, "Rank of the gradient's projection; below that of the factors, when these are trained.")
    alpha: float = knob(1.0, "Multiplies the projected step: 1 for fine-tuning, the official 0.25 for pretraining.")
    gamma: float = knob(1.01, "How much the norm of the residual may grow from one step to the next.")
    residual_mode: str = knob("official", "'official' as in the authors' code, 'paper' as printed; equal for alpha 1.")
    scaling: str = knob("column", "Residual scaled by 'column' (row, if tall), or all of a 'matrix' by one factor.")
    optimizer: str = knob("adamw", "'adamw' or 'rmsprop'.")
    basis: str = knob("svd", "Where the subspace comes from: 'svd', or vectors chosen from 'dct2', 'dct3' or 'random'.")
    betas: tuple[float, float] = knob((0.9, 0.999), "Decay of the moments; RMSProp uses the first.")
    eps: float = knob(1e-6, "Added to the root of the second moment.")
    svd_method: str = knob("auto", "SVD of the gradient: 'auto', 'full', 'gram' or 'lowrank' (seeded, randomised).")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_sided = ("std", "reverse_std", "left", "right")
        self._require(self.proj_type in one_sided, "proj_type", f"one of {', '.join(one_sided)}")
        self._require(self.alpha > 0, "alpha", "positive")
        self._require(self.gamma >= 1, "gamma", "at least 1")
        choices = {"residual_mode": RESIDUAL_MODES, "scaling": SCALINGS, "optimizer": OPTIMIZERS, "basis": BASES}
        for name, allowed in {**choices, "svd_method": METHODS}.items():
            self._require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}")

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> SubspaceOptimizer:
        options = self._options("gamma", "residual_mode", "scaling", "basis", "svd_method", "eps")
        options |= {"lr": lr, "scale": self.alpha}
        groups = self._groups(model, weight_decay)
        if self.optimizer == "rmsprop":
            return FiraRMSProp(groups, beta=self.betas[0], **options)
        return FiraAdamW(groups, betas=self.betas, **options)
