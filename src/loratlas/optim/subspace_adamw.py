"""AdamW in gradient subspaces: the constructor that GaLore and Fira share."""

from __future__ import annotations

from typing import Any

from loratlas.optim import rules
from loratlas.optim.subspace import SubspaceOptimizer


class SubspaceAdamW(SubspaceOptimizer):
    """`SubspaceOptimizer` with AdamW's options; what they mean stands with `galore.GaLoreAdamW`."""

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
