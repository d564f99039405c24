"""GaLore (arXiv 2403.03507): the optimizer's moments live in a low-rank projection of the gradient.

    every T steps   P <- the r leading singular vectors of G on its smaller side
    R = G P^T       or P G for a wide matrix
    N = Adam(R)     the moments are not touched by a new P
    W <- W - lr_t scale N P

Follows the official code (jiaweizzhao/GaLore), whose Adam adds eps to the uncorrected root and decays weights after the
step. State of an m x n matrix, m <= n: m r + 2 n r numbers instead of 2 m n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from loratlas.engine.config import knob
from loratlas.engine.parts import OptimizerConfig
from loratlas.optim import adafactor, eight_bit, rules
from loratlas.optim.groups import parameter_groups
from loratlas.optim.subspace import SubspaceOptimizer


class GaLoreAdamW(SubspaceOptimizer):
    """AdamW in gradient subspaces; groups with a `rank` are projected, with the options of `SubspaceOptimizer`.

        GaLoreAdamW([{"params": matrices, "rank": 128, "scale": 0.25}, {"params": others}], lr=0.01)

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr, betas, eps, weight_decay: those of AdamW.
        correct_bias: False leaves the moments' start at 0 uncorrected.
        order: "hf" as the official code, "torch" as torch.optim.AdamW: see `rules.AdamW`.
        layerwise: update inside the backward pass: see `layerwise`.
        **options: defaults of the groups' other options.
    """

    rule = rules.AdamW()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        order: str = "hf",
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, {**own, "order": order, **options}, layerwise)


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with 8-bit moments; bases stay in full precision. Needs bitsandbytes or torchao."""

    rule = eight_bit.AdamW8bit()


class GaLoreAdafactor(SubspaceOptimizer):
    """Adafactor in gradient subspaces; its options are those of `adafactor.Adafactor`."""

    rule = adafactor.Adafactor()

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1}
        how = {"scale_parameter": scale_parameter, "relative_step": relative_step, "warmup_init": warmup_init}
        super().__init__(params, {**own, **how, "weight_decay": weight_decay, **options}, layerwise)


OPTIMIZERS = ("adamw", "adafactor", "adamw8bit")


@dataclass
class GaLoreConfig(OptimizerConfig):
    """GaLore over a model's matrices; everything else that trains takes the same optimizer unprojected.

        optimizer = GaLoreConfig(r=128, target_modules=["q_proj", "v_proj"]).build(model, lr=0.01)

    Source: arXiv 2403.03507.

    Raises:
        UserError: an option out of its range, or no matrix to project.
    """

    name = "galore"
    trains_base = True

    r: int = knob(128, "Rank of the gradient's projection.")
    target_modules: list[str] | str | None = knob(
        "all-linear", "Matrices to project: parts of their names, a regular expression, or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = knob(None, "Modules to leave unprojected, given like target_modules.")
    update_proj_gap: int = knob(200, "Steps from one choice of the subspace to the next.")
    scale: float = knob(0.25, "Multiplies the projected step: the official 0.25 for pretraining, 4 for fine-tuning.")
    proj_type: str = knob("std", "Sides that are projected: 'std', 'reverse_std', 'left', 'right' or 'full'.")
    basis: str = knob("svd", "Where the subspace comes from: 'svd', or vectors chosen from 'dct2', 'dct3' or 'random'.")
    moments: str = knob("keep", "Moments at a new subspace: 'keep', 'reset', or 'permute' where vectors can be told.")
    optimizer: str = knob("adamw", "'adamw', 'adafactor' or 'adamw8bit' (with bitsandbytes or torchao).")
    layerwise: bool = knob(
        False, "Update inside the backward pass and free each gradient; no accumulation, no clipping."
    )
    betas: tuple[float, float] = knob((0.9, 0.999), "Decay of the first and the second moment.")
    eps: float = knob(1e-6, "Added to the root of the second moment.")
    svd_method: str = knob("auto", "SVD of the gradient: 'auto', 'full', 'gram' or 'lowrank' (seeded, randomised).")
    state_dtype: str = knob("float32", "Moments and bases in 'float32', or 'weight' for the dtype of the weights.")
    seed: int = knob(0, "Seed of random bases and randomised SVDs.")

    def __post_init__(self) -> None:
        self._require(isinstance(self.r, int) and self.r >= 1, "r", "an integer of at least 1")
        self._require(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}")
        self._require(self.scale > 0, "scale", "positive")

    def check(self, model: nn.Module) -> None:
        self._groups(model, 0.0)

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> SubspaceOptimizer:
        groups = self._groups(model, weight_decay)
        if self.optimizer == "adafactor":
            fixed: dict[str, Any] = {"relative_step": False, "scale_parameter": False, "beta1": self.betas[0] or None}
            return GaLoreAdafactor(groups, lr=lr, layerwise=self.layerwise, **fixed, **self._common())
        make = GaLoreAdamW if self.optimizer == "adamw" else GaLoreAdamW8bit
        return make(groups, lr=lr, betas=self.betas, eps=self.eps, layerwise=self.layerwise, **self._common())

    def _groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        projected = {"rank": self.r, "update_proj_gap": self.update_proj_gap, "scale": self.scale}
        return parameter_groups(model, projected, self.target_modules, self.exclude_modules, weight_decay)

    def _common(self) -> dict[str, Any]:
        names = ("proj_type", "basis", "moments", "svd_method", "state_dtype", "seed")
        return {name: getattr(self, name) for name in names}
