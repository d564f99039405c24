"""LoRA-XS (arXiv 2405.17604) and LoRA-SB (arXiv 2411.19557): an r x r core trains between fixed bases.

    W' = W + s B N A,      B (out, r), A (r, in) fixed,      N (r, r) trained: r^2 parameters a layer

    LoRA-XS   B = U_r   A = S_r V_r^T   of W = U S V^T          N ~ normal(0, 1e-5)
    LoRA-SB   B = U_r   A = V_r^T       of D = U S V^T          N = diag(S_r) / s,   D = -eta sign(mean gradient of W)

D is AdamW's first full update: LoRA-SB starts one such step ahead, deliberately not at the base model's function. With
orthonormal bases the gradient of N, s B^T G A^T, is the best that any step within the subspace can follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine import cores
from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.cores import CoreMethod
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg.factorise import usable_svd


class LoraXS(CoreMethod):
    name = "lora-xs"
    params = ("N",)
    buffers = ("A", "B")

    def place(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        u, s, vh = usable_svd(weight(), t.r, **t.cfg.svd_options())
        if len(s) < t.r:
            return len(s)
        cores.start(t, u, nn.init.normal_(torch.empty_like(t.N), std=t.cfg.init_std), s[:, None] * vh)
        return None


class LoraSB(LoraXS):
    name = "lora-sb"

    def gather(self, cfg: LoraSBConfig) -> tuple[str, ...]:
        return ("gradient",) if cfg.init_weights else ()

    def place(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        gradient = t.statistics["gradient"].to(t.N)
        if not bool(torch.isfinite(gradient).all()):
            raise UserError("its calibrated gradient holds NaN or infinite entries: look for them in data and loss.")
        update = -t.cfg.init_lr * (gradient.sign() if t.cfg.init_update == "sign" else gradient)
        # a layer that the calibration did not reach: directions of its weight, and no step along them
        source = update if update.any() else weight()
        u, s, vh = usable_svd(source, t.r, **t.cfg.svd_options())
        if len(s) < t.r:
            return len(s)
        cores.start(t, u, torch.diag(s if source is update else torch.zeros_like(s)) / t.scaling, vh)
        return None


@adapter(LoraXS())
@dataclass
class LoraXSConfig(SvdConfig):
    """LoRA-XS. The official code scales by alpha / r with alpha = 16; here alpha None means s = 1.

    Raises:
        UserError: a field is out of its range.
    """

    init_std: float = knob(1e-5, "Standard deviation of the core's start; 0 starts at the base model's very function.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.init_weights in (True, False), "init_weights", "True or False")
        self._require(self.init_std >= 0.0, "init_std", "at least 0")


@adapter(LoraSB())
@dataclass
class LoraSBConfig(SvdConfig):
    """LoRA-SB. Needs the gradients of the adapted layers: `loratlas.calibrate(model, config, batches)` first.

    Use weight_decay=0: decay pulls the core and with it the first step back.

    Raises:
        UserError: a field is out of its range.
    """

    init_lr: float = knob(
        1e-4, "eta, the size of the update to start from; the paper's is the learning rate divided by warm-up steps."
    )
    init_update: str = knob("sign", "'sign': AdamW's first step (the paper's). 'raw': gradient descent's.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.init_weights in (True, False), "init_weights", "True or False")
        self._require(self.init_lr > 0.0, "init_lr", "positive")
        self._require(self.init_update in ("sign", "raw"), "init_update", "'sign' or 'raw'")
