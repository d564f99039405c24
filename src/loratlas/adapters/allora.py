"""ALLoRA: adaptive learning rate for LoRA (arXiv 2410.09692, section 4.2). No official code is known.

    y = x W^T + x A^T B^T              no dropout, no scaling
    c_i = 1 / sqrt(||(B A)_i|| + 1 / eta^2)         for every output row i, recomputed in each forward

With g = dL/dy the factors get their gradients from g c instead of g; what flows on to x does not:

    dL/dB = (c g)^T (x A^T)      dL/dA = B^T (c g)^T x      dL/dx = g W + g B A

At the start B A is 0 and c is eta in every row, so that B leaves zero fast; as rows grow c falls like their norm to the
power of -1/2. The norms come from the r x r Gram matrix, ||(B A)_i||^2 = B_i (A A^T) B_i^T, never from B A.

Adam divides a constant factor of a row out again: with it the rows of B keep their size of step and only A sees the
weights c. `apply_to="update"` multiplies what the optimizer does to the rows of B instead, whatever the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.moments import slot_rates
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import whole


class ALLora(LowRankMethod):
    name = "allora"
    kinds = ("linear", "conv1d", "conv2d")
    params = ("A", "B")

    def shapes(self, cfg: ALLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n_in), "B": (n_out, r)}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        nn.init.kaiming_uniform_(t.A, a=5**0.5)
        if not t.cfg.init_weights:
            nn.init.kaiming_uniform_(t.B, a=5**0.5)
        return None

    def factors(self, t: View) -> Factors:
        up = t.B if t.scaling == 1.0 else t.B * t.scaling
        scales = t.cfg.apply_to == "gradient" and torch.is_grad_enabled()
        return Factors(t.A, up, row_scale=coefficients(t.A, t.B, t.cfg.eta) if scales else None)

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        if views[0].cfg.apply_to == "update":
            rates = [(t.B, 0, coefficients(whole(t.A), whole(t.B), t.cfg.eta)) for t in views]
            ctx.scratch[self] = slot_rates(rates)

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        if self in ctx.scratch:
            ctx.scratch[self]()


@torch.no_grad()
def coefficients(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """c = (||(B A)_i|| + 1 / eta^2)^(-1/2) for A (r, in) and B (out, r); (out,), in their dtype."""
    with torch.autocast(a.device.type, enabled=False):
        squares = ((b @ (a @ a.T)) * b).sum(1).clamp_min(0.0)
    return (squares.sqrt() + eta**-2).rsqrt()


@adapter(ALLora())
@dataclass
class ALLoraConfig(AtlasConfig):
    """ALLoRA. Clipping the gradient's norm sees the factors c.

    Raises:
        UserError: a field is out of its range; lora_alpha or lora_dropout is set.
    """

    eta: float = knob(2.0, "Largest factor, that of rows which are still zero. The paper's value is not known.")
    apply_to: str = knob(
        "gradient",
        "'gradient': the paper's. 'update': multiply the optimizer's change of B's rows, which Adam cannot undo "
        "(ours); needs `loratlas.attach` or `LifecycleCallback`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0.0 < self.eta < float("inf"), "eta", "positive and finite")
        self._require(self.apply_to in ("gradient", "update"), "apply_to", "'gradient' or 'update'")
        self._require(self.lora_alpha is None, "lora_alpha", "left out (ALLoRA has no scaling)")
        self._require(not self.alpha_pattern, "alpha_pattern", "left out (ALLoRA has no scaling)")
        self._require(self.lora_dropout == 0.0, "lora_dropout", "0 (ALLoRA has no dropout)")
