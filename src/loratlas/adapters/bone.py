"""Bone and MiSS: one small block that many blocks of the weight share (arXiv 2409.15371).

    Bone (BAT)   W'[a, b] = W[a, b] + s (W[a, b] D_a + D_a)       W in r x r blocks, D (out / r, r, r)
    MiSS         W'[o, i] = W[o, i] + s D[i mod r, o]             D (r, out): every shard of r inputs gets the same

All of it starts at zero. Bone multiplies with the frozen block, so blocks get different updates, of full rank; MiSS is
a LoRA whose A = [I I ... I] only sums the shards of the input. The paper's first version calls the first one Bone; its
later versions and PEFT call it BAT, and Bone (then DiSHA, then MiSS) the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from loratlas.engine.binding import BoundConfig
from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, Method, View
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg import blocks

VARIANTS = ("bat-col", "bat-row", "bat-ab")


class Bone(Method):
    """Tensors: D, or for 'bat-ab' A and B, of r x r blocks: out / r of them for 'bat-col', else in / r."""

    name = "bone"
    params = ("D", "A", "B")
    additive = False

    def bound(self, cfg: BoneConfig) -> bool:
        return True

    def shapes(self, cfg: BoneConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        blocks.require_blocks(r, n_out, n_in)
        names = ("A", "B") if cfg.variant == "bat-ab" else ("D",)
        return dict.fromkeys(names, ((n_out if cfg.variant == "bat-col" else n_in) // r, r, r))

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        for tensor in (t.D, t.A, t.B):
            if tensor is not None and not t.cfg.init_weights:
                nn.init.normal_(tensor, std=0.1)

    def merged(self, t: View, weight: Tensor) -> Tensor:
        affine = blocks.affine_rows if t.cfg.variant == "bat-col" else blocks.affine_columns
        factor, shift = self.factor_and_shift(t)
        return weight + affine(weight, factor.to(weight.dtype), shift.to(weight.dtype))

    def output(self, t: View, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """W[a, b] F_b x_b = W[a, b] (F_b x_b): a factor that is the same in a column of blocks can act on the input."""
        if t.cfg.variant == "bat-col":
            return None
        factor, shift = (tensor.to(x.dtype) for tensor in self.factor_and_shift(t))
        y = base(x + blocks.times_shards(x, factor))
        added = nn.functional.linear(x, shift.transpose(0, 1).reshape(t.r, -1))
        return (y.view(*y.shape[:-1], -1, t.r) + added.unsqueeze(-2).to(y.dtype)).view(y.shape)

    @staticmethod
    def factor_and_shift(t: View) -> tuple[Tensor, Tensor]:
        """F and T of the update W F + T in every block, scaling folded in."""
        factor, shift = (t.A, t.B) if t.D is None else (t.D, t.D)
        return (factor, shift) if t.scaling == 1.0 else (factor * t.scaling, shift * t.scaling)


class Miss(LowRankMethod):
    """Tensor D: (r, out), or (r, mini_r), whose columns then serve every mini_r-th output."""

    name = "miss"
    params = ("D",)

    def shapes(self, cfg: AtlasMissConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        if r > n_in:
            raise UserError(f"shards of r={r} inputs are wider than its {n_in} inputs: take r={n_in} or less.")
        if cfg.mini_r is not None and n_out % cfg.mini_r:
            near = blocks.nearest_divisor(cfg.mini_r, n_out)
            raise UserError(f"mini_r={cfg.mini_r} does not divide its {n_out} outputs: take {near} (the nearest).")
        return {"D": (r, cfg.mini_r or n_out)}

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        if not t.cfg.init_weights:
            nn.init.kaiming_uniform_(t.D, a=5**0.5)

    def factors(self, t: View) -> Factors:
        n_out, n_in = t.op.shape
        up = t.D.T.repeat(n_out // t.D.shape[1], 1) if t.D.shape[1] < n_out else t.D.T
        return Factors(blocks.tiled_identity(t.r, n_in, t.D), up if t.scaling == 1.0 else up * t.scaling)


@adapter(Bone())
@dataclass
class BoneConfig(BoundConfig):
    """Bone of the paper's first version, PEFT's BAT. In every block of a row (or column) of blocks the same affine map.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(64, "Width of the blocks; it must divide both sides of every adapted weight.")
    variant: str = knob(
        "bat-col",
        "'bat-col': W[a, b] D_a + D_a, PEFT's 'bat'. 'bat-row': W[a, b] D_b + D_b, which never builds the weight. "
        "'bat-ab': W[a, b] A_b + B_b, likewise.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}")
        self._require(self.lora_dropout == 0.0, "lora_dropout", "0 (there is no branch beside the weight to drop from)")


@adapter(Miss())
@dataclass
class AtlasMissConfig(AtlasConfig):
    """MiSS, called Bone or DiSHA in between: a LoRA whose fixed A sums shards of the input. PEFT has it as MissConfig.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(64, "Width of the shards and rank of the update; the last shard may be narrower.")
    mini_r: int | None = knob(None, "Period of D along the outputs, which it must divide: r x mini_r parameters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.mini_r is None or self.mini_r >= 1, "mini_r", "at least 1")
