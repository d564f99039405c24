"""Block-LoRA: LoRA in n blocks of ranks that share one down projection (arXiv 2501.16720). No official code is known.

    W' = W + s sum_i B_i A        A (r / n, in),  B_i (out, r / n),  s = alpha / sqrt(r)

r out + (r / n) in parameters, n times fewer for A than LoRA's. All B_i start at zero and get the same gradient, so they
stay equal: the function is a LoRA of rank r / n whose B = n B_i moves n times as far in a step. `efficient` keeps one
B_i for all n, with the gradient that each would get, and so follows the same path with any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg.blocks import nearest_divisor


class BlockLora(LowRankMethod):
    """Tensors: A (r / n, in) and B (n, out, r / n), or B (out, r / n) with `efficient`.

    With share="input": A (r, in / n) and B (out, r).
    """

    name = "block-lora"
    kinds = ("linear", "conv1d", "conv2d")
    params = ("A", "B")

    def scale(self, cfg: BlockLoraConfig, r: int, alpha: float | None) -> float:
        if alpha is None:
            return 1.0
        return alpha / (r**0.5 if cfg.use_rslora else r)

    def shapes(self, cfg: BlockLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        n = cfg.n_blocks
        if cfg.share == "input":
            if n_in % n:
                near = nearest_divisor(n, n_in)
                raise UserError(f"n_blocks={n} does not divide its {n_in} inputs: take {near} (the nearest).")
            return {"A": (r, n_in // n), "B": (n_out, r)}
        if r % n:
            raise UserError(f"its rank r={r} does not divide into n_blocks={n}: take r={max(1, round(r / n)) * n}.")
        return {"A": (r // n, n_in), "B": (n_out, r // n) if cfg.efficient else (n, n_out, r // n)}

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        nn.init.kaiming_uniform_(t.A, a=5**0.5)
        if not t.cfg.init_weights:
            nn.init.normal_(t.B, std=0.1)

    def factors(self, t: View) -> Factors:
        if t.cfg.share == "input":
            return Factors(t.A.repeat(1, t.cfg.n_blocks), t.B * t.scaling)
        return Factors(t.A, self.summed(t) * t.scaling)

    @staticmethod
    def summed(t: View) -> Tensor:
        """sum_i B_i, (out, r / n)."""
        if not t.cfg.efficient:
            return t.B.sum(0)
        # n B in value; in the gradient one of the n, which is what each B_i would get
        return t.B + (t.cfg.n_blocks - 1) * t.B.detach()


@adapter(BlockLora())
@dataclass
class BlockLoraConfig(AtlasConfig):
    """Block-LoRA. The paper compares with CLIP-LoRA, whose settings are r = 2, alpha = 1 and dropout 0.25.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(8, "Rank r of the whole; the update has rank r / n_blocks. It must be a multiple of n_blocks.")
    n_blocks: int = knob(2, "n, the number of blocks that share one down projection.")
    lora_alpha: float | None = knob(
        1, "Numerator of the scaling alpha / sqrt(r), with the whole r; None: a scaling of 1."
    )
    use_rslora: bool = knob(True, "Scale by alpha / sqrt(r), as CLIP-LoRA does; False: by alpha / r.")
    share: str = knob(
        "rank",
        "'rank': blocks along the rank, delta = sum_i B_i A. 'input': blocks along the input, delta = B [A ... A], the "
        "other reading of the abstract.",
    )
    efficient: bool = knob(
        False, "Keep one B_i instead of n equal ones: the same training with fewer numbers (share='rank')."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(isinstance(self.n_blocks, int) and self.n_blocks >= 1, "n_blocks", "an integer of at least 1")
        self._require(self.share in ("rank", "input"), "share", "'rank' or 'input'")
        self._require(
            not self.efficient or self.share == "rank", "efficient", "False with share='input', which has one B"
        )
        near = max(1, round(self.r / self.n_blocks)) * self.n_blocks
        fits = self.share == "input" or self.r % self.n_blocks == 0
        self._require(fits, "r", f"a multiple of n_blocks={self.n_blocks}, such as {near}")
