"""TLoRA: a tensor-ring transform of the weight and a small residual (arXiv 2501.08727). No official code was seen.

    W' = W T + s Delta        T (in, in) a tensor-ring matrix, the identity at the start; Delta a tensor ring, or B A

The transform is of full rank with few parameters, R^2 sum_d I_d^2 for in = I_1 ... I_D; the residual has rank R'^2 and
R'^2 (sum O_d + sum I_d) parameters (see `linalg.tensor_ring`). W' is built once a forward and again in the backward
pass; on a quantised base T acts on the input instead. Of other methods called T-LoRA this is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine.binding import BoundConfig
from loratlas.engine.config import knob
from loratlas.engine.method import Method, View
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg import tensor_ring

MOST = 4  # factors of a dimension
_LARGEST = 64  # a factor this large is no small core any more, unless the dimension is huge


class TLora(Method):
    """Tensors: A1 ... the transform's cores (I_d, I_d, R, R); B1 ... (O_d, R', R') and C1 ... (I_d, R', R') those of
    the residual, or down (r, in) and up (out, r)."""

    name = "tlora"
    params = (*(f"{name}{d}" for name in "ABC" for d in range(1, MOST + 1)), "down", "up")
    additive = False

    def bound(self, cfg: TLoraConfig) -> bool:
        return True

    def shapes(self, cfg: TLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        ins, rank = cfg.split(n_in), cfg.transform_rank
        found: dict[str, tuple[int, ...]] = {f"A{d}": (n, n, rank, rank) for d, n in enumerate(ins, 1)}
        if cfg.residual == "lora":
            return {**found, "down": (r, n_in), "up": (n_out, r)}
        if cfg.residual == "ring":
            found |= {f"B{d}": (n, r, r) for d, n in enumerate(cfg.split(n_out), 1)}
            found |= {f"C{d}": (n, r, r) for d, n in enumerate(ins, 1)}
        return found

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        transform, ups, downs = (cores(t, name) for name in "ABC")
        random = torch.Generator().manual_seed(t.cfg.seed) if t.cfg.transform_init == "gauge" else None
        sizes = [core.shape[0] for core in transform]
        for core, value in zip(transform, tensor_ring.identity_cores(sizes, t.cfg.transform_rank, random), strict=True):
            core.copy_(value)
        for core in (*ups[1:], *downs):
            nn.init.normal_(core, std=tensor_ring.residual_std(core.shape[0], t.r))
        if t.down is not None:
            nn.init.normal_(t.down, std=1.0 / t.r)
        if not t.cfg.init_weights:
            for first in (*transform[:1], *ups[:1], *(() if t.up is None else (t.up,))):
                first.add_(0.1 * torch.randn_like(first))

    def merged(self, t: View, weight: Tensor) -> Tensor:
        moved = weight @ tensor_ring.ring_matrix(cores(t, "A")).to(weight.dtype)
        added = residual(t)
        return moved if added is None else torch.addmm(moved, added[1].to(weight.dtype), added[0].to(weight.dtype))

    def output(self, t: View, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """(W T) x = W (T x): nothing of W is needed where reading it means dequantising."""
        if t.layer.quantization_backend is None:
            return None
        y = base(nn.functional.linear(x, tensor_ring.ring_matrix(cores(t, "A")).to(x.dtype)))
        added = residual(t)
        return y if added is None else y + t.op.low_rank(x, *added).to(y.dtype)

    def adds_loss(self, cfg: TLoraConfig) -> bool:
        return cfg.regulariser is not None

    def extra_loss(self, views: Sequence[View]) -> Tensor:
        """The weight times the sum over all layers of R_I or R_O."""
        cfg = views[0].cfg
        orthogonal = cfg.regulariser == "orthogonal"
        distance = tensor_ring.orthogonality_distance if orthogonal else tensor_ring.identity_distance
        return cfg.regulariser_weight * torch.stack([distance(cores(t, "A")) for t in views]).sum()


def cores(t: View, name: str) -> list[Tensor]:
    """The cores called `name`1, `name`2, ...; none where the config has none."""
    found = (getattr(t, f"{name}{d}") for d in range(1, MOST + 1))
    return [core for core in found if core is not None]


def residual(t: View) -> tuple[Tensor, Tensor] | None:
    """(down, up) of s Delta; None without a residual."""
    if t.cfg.residual is None:
        return None
    down, up = t.down, t.up
    if down is None:
        up, down = tensor_ring.ring_factors(cores(t, "B"), cores(t, "C"))
    return down, up if t.scaling == 1.0 else up * t.scaling


@adapter(TLora())
@dataclass
class TLoraConfig(BoundConfig):
    """TLoRA.

    Raises:
        UserError: a field is out of its range, or a dimension of a layer has no small factors.
    """

    r: int = knob(6, "R' of the residual's ring, whose rank is R'^2; with residual='lora' its rank.")
    transform_rank: int = knob(2, "R of the transform's ring.")
    residual: str | None = knob("ring", "'ring'; 'lora' (TLoRA*): B A; None: the transform alone.")
    num_factors: int = knob(3, "Into how many factors a dimension is split, 2 to 4; fewer for small ones.")
    factors: dict[str, list[int]] = knob(
        {}, "Factors of single dimensions, first the fastest index: {'320': [4, 8, 10]}. Others are split evenly."
    )
    transform_init: str = knob(
        "paper",
        "'paper': the identity by equal slices, which never part while training. 'gauge': the identity by slices that "
        "differ, so that transform_rank > 1 is worth something (ours).",
    )
    regulariser: str | None = knob(None, "'identity' (R_I) or 'orthogonal' (R_O) of the transform, added to the loss.")
    regulariser_weight: float = knob(1e-3, "Weight of the regulariser; the paper's is not known.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.transform_rank >= 1, "transform_rank", "at least 1")
        self._require(self.residual in ("ring", "lora", None), "residual", "'ring', 'lora' or None")
        self._require(2 <= self.num_factors <= MOST, "num_factors", f"between 2 and {MOST}")
        self._require(self.transform_init in ("paper", "gauge"), "transform_init", "'paper' or 'gauge'")
        self._require(self.regulariser in ("identity", "orthogonal", None), "regulariser", "identity, orthogonal, None")
        self._require(self.regulariser_weight >= 0.0, "regulariser_weight", "at least 0")
        self._require(self.lora_dropout == 0.0, "lora_dropout", "0 (there is no branch beside the weight to drop from)")
        for name, parts in self.factors.items():
            product = torch.tensor(parts).prod().item() if parts else 0
            fits = name.isdigit() and 1 <= len(parts) <= MOST and product == int(name) and min(parts) >= 1
            self._require(fits, "factors", f"1 to {MOST} factors of each dimension (those of {name} are {parts})")

    def split(self, n: int) -> list[int]:
        """The factors of a dimension n.

        Raises:
            UserError: one of them is too large for a small core.
        """
        if str(n) in self.factors:
            return list(self.factors[str(n)])
        found = tensor_ring.factorise(n, self.num_factors)
        if max(found) > max(_LARGEST, 4 * n ** (1 / self.num_factors)):
            raise UserError(
                f"its dimension {n} = {' x '.join(map(str, found))} has no small factors, so a ring of it saves "
                "nothing: leave the module out of target_modules, or say in `factors` how to split it."
            )
        return found
