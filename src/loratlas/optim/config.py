"""The options that GaLore, Fira and DCT-AdamW share, and how these become parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from loratlas.engine.config import knob
from loratlas.engine.parts import OptimizerConfig
from loratlas.optim.groups import parameter_groups
from loratlas.optim.projector import SIDES
from loratlas.optim.subspace import STATE_DTYPES


@dataclass
class SubspaceConfig(OptimizerConfig):
    """A subspace optimizer over the matrices of a model; what else trains takes the same optimizer unprojected.

    Raises:
        UserError: an option out of its range; in `check` and `build`, no matrix to project.
    """

    r: int = knob(128, "Rank of the gradient's projection.")
    target_modules: list[str] | str | None = knob(
        "all-linear", "Matrices to project: parts of their names, a regular expression, or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = knob(None, "Modules to leave unprojected, given like target_modules.")
    update_proj_gap: int = knob(200, "Steps from one choice of the subspace to the next.")
    proj_type: str = knob("std", "Sides that are projected: 'std', 'reverse_std', 'left', 'right' or 'full'.")
    state_dtype: str = knob("float32", "Moments and bases in 'float32', or 'weight' for the dtype of the weights.")
    seed: int = knob(0, "Seed of random bases and randomised SVDs.")

    def __post_init__(self) -> None:
        self._require(isinstance(self.r, int) and self.r >= 1, "r", "an integer of at least 1")
        gap = self.update_proj_gap
        self._require(isinstance(gap, int) and gap >= 1, "update_proj_gap", "an integer of at least 1")
        self._require(self.proj_type in SIDES, "proj_type", f"one of {', '.join(SIDES)}")
        self._require(self.state_dtype in STATE_DTYPES, "state_dtype", f"one of {', '.join(STATE_DTYPES)}")

    def check(self, model: nn.Module) -> None:
        self._groups(model, 0.0)

    def _groups(self, model: nn.Module, weight_decay: float, max_dim: int | None = None) -> list[dict[str, Any]]:
        return parameter_groups(
            model, {"rank": self.r}, self.target_modules, self.exclude_modules, weight_decay, max_dim
        )

    def _options(self, *names: str) -> dict[str, Any]:
        """Options that every group has, by the names of this configuration and its optimizer."""
        return {name: getattr(self, name) for name in ("update_proj_gap", "proj_type", "state_dtype", "seed", *names)}
