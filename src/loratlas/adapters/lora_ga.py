"""LoRA-GA: a LoRA that starts along the gradient of full fine-tuning (arXiv 2407.05000, official code read).

    G = dL/dW ~ U S V^T,  top 2r triplets     A* = c V[:, a]^T,  B* = c U[:, b],  a and b disjoint halves of 0..2r-1
    W' = W + s (B A - B* A*)                  s = alpha / sqrt(r)

The first SGD step moves s B A by -eta s^2 (B* B*^T G + G A*^T A*). With disjoint halves its two terms cover 2r
directions, so it is the best approximation of the full update that rank 2r allows; any halves are equally good at that.

| scale | c |
|---|---|
| stable | m^(1/4) / gamma^(1/2), m = out: the output's scale is O(1) in the width |
| gd | 1 / s: the first step is that of full fine-tuning |
| unit | 1 |
| weightS | mean over i < r of sqrt(sigma_i(W) / s) |

The official code moves s B* A* out of W; here W stays as it is (see `engine.pairs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas.adapters.lora import Lora, random_start
from loratlas.engine import pairs
from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.linalg.svd import top_svd

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weightS")


class LoraGA(Lora):
    name = "lora-ga"
    kinds = ("linear", "conv1d", "conv2d")

    def gather(self, cfg: LoraGAConfig) -> tuple[str, ...]:  # type: ignore[override]
        return ("gradient",) if cfg.init_weights else ()

    def shapes(self, cfg: LoraGAConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        return pairs.shapes(r, n_in, n_out)

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        directions = min(t.op.shape)
        if t.r > max(1, directions // 2):
            return max(1, directions // 2)
        if not t.cfg.init_weights:
            random_start(t.A, t.B, embedding=False, identity=False)
        elif directions > 1 and t.statistics["gradient"].any():
            pairs.start(t, *start_factors(t, t.statistics["gradient"], weight))
        else:  # there is nothing to choose from: LoRA's own start
            random_start(t.A, t.B, embedding=False, identity=True)
            pairs.start(t, t.A, t.B)
        return None


def start_factors(t: View, gradient: Tensor, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """A* (r, in) and B* (out, r) for the gradient G (out, in)."""
    cfg = t.cfg
    u, s, vh = top_svd(gradient, 2 * t.r, **cfg.svd_options())
    for_a, for_b = (index.to(u.device) for index in halves(cfg.direction, t.r, cfg.seed))
    if cfg.peft_compat:
        for_b = for_a if cfg.direction == "random" else for_b
        return _pefts_factors(t, vh[for_a], u[:, for_b], s[for_b], weight)
    down, up = vh[for_a], u[:, for_b]
    if cfg.scale == "weightS":
        c = float((top_svd(weight(), t.r)[1] / t.scaling).sqrt().mean())
    else:
        c = {"stable": _stable(t), "gd": 1.0 / t.scaling, "unit": 1.0}[cfg.scale]
    if cfg.norm_clip:
        ratio = weight().abs().max() / (t.scaling * c * c * up @ down).abs().max()
        c *= float(ratio.clamp_max(1.0).sqrt())
    return c * down, c * up


def _stable(t: View) -> float:
    return t.op.shape[0] ** 0.25 / t.cfg.stable_gamma**0.5


def _pefts_factors(t: View, down: Tensor, up: Tensor, s: Tensor, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """PEFT's start: B* carries the singular values s (r,) of G, and most scales concern B* alone."""
    up = up * s
    if t.cfg.scale == "gd":
        return down / t.scaling, up / t.scaling
    if t.cfg.scale == "stable":
        return down, up * _stable(t)
    if t.cfg.scale == "weightS" and s[0] > 0:
        return down, up * (top_svd(weight(), 1)[1] / s[0])
    return down, up


def halves(direction: str, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices among 0..2r-1 of the right vectors that A takes and of the left ones that B takes."""
    every = torch.arange(2 * r)
    if direction == "ArB2r":
        return every[:r], every[r:]
    if direction == "A2rBr":
        return every[r:], every[:r]
    if direction == "ArBr":
        return every[1::2], every[0::2]
    mixed = torch.randperm(2 * r, generator=torch.Generator().manual_seed(seed))
    return mixed[:r], mixed[r:]


@adapter(LoraGA())
@dataclass
class LoraGAConfig(SvdConfig):
    """LoRA-GA. Call `loratlas.calibrate(model, config, batches, steps=N)` before `get_peft_model`.

    Defaults are the paper's: r = 8, alpha = 16, scaling alpha / sqrt(r); 64 steps with two samples each.

    Raises:
        UserError: a field is out of its range, or peft_compat is combined with norm_clip, which PEFT lacks.
    """

    lora_alpha: float | None = knob(16, "Numerator of the scaling; None means a scaling of 1.")
    use_rslora: bool = knob(True, "Scale by alpha / sqrt(r), as the paper does, instead of alpha / r.")
    direction: str = knob("ArB2r", "Which halves A and B take: 'ArB2r', 'A2rBr', 'ArBr' (every other) or 'random'.")
    scale: str = knob("stable", "Size of the start: 'stable', 'gd', 'unit' or 'weightS', see the table above.")
    stable_gamma: float = knob(16, "gamma of scale='stable'; larger starts smaller.")
    norm_clip: bool = knob(False, "Shrink the start until no entry of s B* A* exceeds the largest of W.")
    peft_compat: bool = knob(
        False,
        "Start as PEFT 0.21 does instead: B times the gradient's singular values, and only B scaled by 'stable' (or by "
        "sigma_1(W) / S_B[0] for 'weightS'); 'random' takes the same half for A and B.",
    )
    svd_method: str = knob("lowrank", "SVD of the gradient: 'lowrank' (seeded, randomised), 'auto', 'full' or 'gram'.")
    svd_niter: int = knob(4, "Power iterations of svd_method='lowrank'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.direction in DIRECTIONS, "direction", f"one of {', '.join(DIRECTIONS)}")
        self._require(self.scale in SCALES, "scale", f"one of {', '.join(SCALES)}")
        self._require(self.stable_gamma > 0, "stable_gamma", "positive")
        self._require(not (self.norm_clip and self.peft_compat), "norm_clip", "False with peft_compat=True")
