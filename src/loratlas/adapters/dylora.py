"""DyLoRA: one LoRA for every rank up to r (arXiv 2210.07558; official code in huawei-noah/Efficient-NLP).

    y = x W^T + (alpha / b) x A[:b]^T B[:, :b]^T            b drawn anew for every optimizer step from 1 .. r

All layers share b, so the pairs come to be ordered: the first b of them are an adapter of rank b, for any b, without
training again. With `frozen` (the official script's default) only pair b learns while the pairs before it take part
with their values. Adam still moves the others by momentum and decay, as in the official code; `strict_freeze` keeps
them where they are, which is what the paper's text says.

In evaluation the rank is the one that `set_rank` chose, r unless it was called.
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
from loratlas.engine.model import atlas_layers
from loratlas.engine.moments import slot_rates
from loratlas.engine.nested import use_rank
from loratlas.engine.registry import adapter
from loratlas.errors import UserError


class DyLora(LowRankMethod):
    """Beside the factors: rank (), in use in evaluation; drawn (), in use in the step that is under way."""

    name = "dylora"
    kinds = ("linear", "conv1d", "conv2d", "embedding")
    params = ("A", "B")
    buffers = ("rank", "drawn")
    nested = "rank"

    def shapes(self, cfg: DyLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, n_in), "B": (n_out, r), "rank": (), "drawn": ()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"rank": torch.int64, "drawn": torch.int64}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        zero, drawn = (t.A, t.B) if t.op.kind == "embedding" else (t.B, t.A)
        nn.init.kaiming_uniform_(drawn, a=5**0.5)
        if not t.cfg.init_weights:
            nn.init.kaiming_uniform_(zero, a=5**0.5)
        t.rank.fill_(min(t.cfg.eval_rank or t.r, t.r))
        t.drawn.copy_(t.rank)
        return None

    # --------------------------------------------------------------------------------------------------- forward

    def factors(self, t: View) -> Factors:
        return self.at(t, t.drawn if t.layer.training else t.rank)

    def delta_weight(self, t: View) -> Tensor:
        down, up = self.at(t, t.rank).joined()
        return up @ down

    def exported(self, t: View) -> Factors:
        """The pairs of the chosen rank alone."""
        factors, rank = self.at(t, t.rank), int(t.rank)
        return Factors(factors.down[:rank], factors.up[:, :rank])

    def at(self, t: View, rank: Tensor) -> Factors:
        """The update at rank b = `rank`, scaling alpha / b. A mask, not a slice: one graph serves every rank."""
        slot = torch.arange(t.r, device=rank.device)
        down, up = t.A, t.B
        if t.cfg.frozen and t.layer.training and torch.is_grad_enabled():
            learns = slot == rank - 1
            down, up = torch.where(learns[:, None], down, down.detach()), torch.where(learns, up, up.detach())
        used = (slot < rank).to(up.dtype)
        return Factors(down, up * (used * (t.scaling * t.r) / rank))

    def export_rank(self, t: View, total_steps: int) -> int | None:
        return min(int(t.rank), *t.op.shape)

    # -------------------------------------------------------------------------------------------------- training

    def begin(self, views: Sequence[View], ctx: StepContext) -> None:
        self.draw(views, ctx)

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        if not views[0].cfg.strict_freeze:
            return
        rates = []
        for t in views:
            slot = torch.arange(t.r, device=t.drawn.device)
            learns = (slot == t.drawn - 1 if t.cfg.frozen else slot < t.drawn).to(t.A.dtype)
            rates += [(t.A, 0, learns), (t.B, 1, learns)]
        ctx.scratch[self] = slot_rates(rates)

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        if self in ctx.scratch:
            ctx.scratch[self]()
        self.draw(views, ctx)

    def draw(self, views: Sequence[View], ctx: StepContext) -> None:
        """The rank of the step after `ctx.step`; when the run is over, the rank of evaluation."""
        cfg, largest = views[0].cfg, max(t.r for t in views)
        units = torch.arange(largest // cfg.unit, dtype=torch.float64)
        weights = (1.0 - cfg.geometric_p) ** units if cfg.rank_distribution == "geometric" else torch.ones_like(units)
        rank = cfg.unit * (1 + int(torch.multinomial(weights, 1, generator=ctx.generator(cfg.seed))))
        for t in views:
            over = 0 < ctx.total_steps <= ctx.step
            t.drawn.copy_(t.rank) if over else t.drawn.fill_(min(rank, t.r))


def set_rank(model: nn.Module, rank: int, adapter_name: str = "default") -> None:
    """Use the first `rank` pairs of every layer from now on: in evaluation, when merging and in exports.

    Raises:
        UserError: there is no DyLoRA adapter of that name, `rank` is not in 1 .. r, or the adapter is merged.
    """
    layers = [layer for _, layer in atlas_layers(model, adapter_name) if isinstance(layer.method, DyLora)]
    if not layers:
        raise UserError(f"set_rank: the model has no DyLoRA adapter {adapter_name!r}.")
    largest = max(layer.atlas_r[adapter_name] for layer in layers)
    if not 1 <= rank <= largest:
        raise UserError(f"set_rank: rank must be between 1 and r={largest}, but it is {rank}.")
    use_rank(model, rank, adapter_name)


@adapter(DyLora())
@dataclass
class DyLoraConfig(AtlasConfig):
    """DyLoRA; r is the largest rank. Training needs `loratlas.attach` or `LifecycleCallback`, or no rank is ever drawn.

    Raises:
        UserError: a field is out of its range.
    """

    lora_alpha: float | None = knob(16, "Numerator of the scaling alpha / b; None: alpha = r.")
    frozen: bool = knob(True, "Only pair b learns in a step of rank b. False: all pairs up to b do.")
    strict_freeze: bool = knob(
        False, "Pairs that do not learn in a step stay where they are; False: momentum and decay move them (official)."
    )
    rank_distribution: str = knob("uniform", "'uniform' over the ranks, or 'geometric', which favours small ones.")
    geometric_p: float = knob(0.1, "Of 'geometric': a rank is drawn with weight (1 - p)^(b - 1). A choice of ours.")
    unit: int = knob(1, "Ranks drawn are multiples of this; it divides r (ours).")
    eval_rank: int | None = knob(None, "Rank of evaluation and exports; None: r. `set_rank` changes it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.rank_distribution in ("uniform", "geometric"), "rank_distribution", "uniform or geometric")
        self._require(0.0 < self.geometric_p < 1.0, "geometric_p", "in (0, 1)")
        self._require(self.unit >= 1 and self.r % self.unit == 0, "unit", f"a divisor of r={self.r}")
        in_range = self.eval_rank is None or 1 <= self.eval_rank <= self.r
        self._require(in_range, "eval_rank", f"between 1 and r={self.r}")
