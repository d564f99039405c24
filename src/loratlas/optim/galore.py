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
from loratlas.linalg.svd import METHODS
from loratlas.optim import adafactor, eight_bit
from loratlas.optim.config import SubspaceConfig
from loratlas.optim.projector import BASES
from loratlas.optim.subspace import MOMENTS, SubspaceOptimizer
from loratlas.optim.subspace_adamw import SubspaceAdamW


class GaLoreAdamW(SubspaceAdamW):
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
class GaLoreConfig(SubspaceConfig):
    """GaLore over a model's matrices; everything else that trains takes the same optimizer unprojected.

        optimizer = GaLoreConfig(r=128, target_modules=["q_proj", "v_proj"]).build(model, lr=0.01)

    Source: arXiv 2403.03507.

    Raises:
        UserError: an option out of its range; in `check` and `build`, no matrix to project, or no 8-bit library.
    """

    name = "galore"
    trains_base = True

    scale: float = knob(0.25, "Multiplies the projected step: the official 0.25 for pretraining, 4 for fine-tuning.")
    basis: str = knob("svd", "Where the subspace comes from: 'svd', or vectors chosen from 'dct2', 'dct3' or 'random'.")
    moments: str = knob("keep", "Moments at a new subspace: 'keep', 'reset', or 'permute' where vectors can be told.")
    optimizer: str = knob("adamw", "'adamw', 'adafactor' or 'adamw8bit' (with bitsandbytes or torchao).")
    layerwise: bool = knob(
        False, "Update inside the backward pass and free each gradient; no accumulation, no clipping."
    )
    betas: tuple[float, float] = knob((0.9, 0.999), "Decay of the moments; Adafactor uses the first, 0 for none.")
    eps: float = knob(1e-6, "Added to the root of Adam's second moment.")
    svd_method: str = knob("auto", "SVD of the gradient: 'auto', 'full', 'gram' or 'lowrank' (seeded, randomised).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}")
        self._require(self.scale > 0, "scale", "positive")
        self._require(self.basis in BASES, "basis", f"one of {', '.join(BASES)}")
        self._require(self.svd_method in METHODS, "svd_method", f"one of {', '.join(METHODS)}")
        allowed = ("keep", "reset") if self.basis == "svd" else MOMENTS
        self._require(self.moments in allowed, "moments", f"one of {', '.join(allowed)} with basis {self.basis}")

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> SubspaceOptimizer:
        options = self._options("scale", "basis", "moments", "svd_method", "layerwise")
        groups = self._groups(model, weight_decay)
        if self.optimizer == "adafactor":
            fixed: dict[str, Any] = {"relative_step": False, "scale_parameter": False, "beta1": self.betas[0] or None}
            return GaLoreAdafactor(groups, lr=lr, **fixed, **options)
        make = GaLoreAdamW if self.optimizer == "adamw" else GaLoreAdamW8bit
        return make(groups, lr=lr, betas=self.betas, eps=self.eps, **options)
