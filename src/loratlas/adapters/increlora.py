"""IncreLoRA (arXiv 2308.12043): every module starts at rank 1, and those with the highest scores get more.

    delta = s r / (R + 1e-5) * B diag(E) A,      A, B ~ N(0, 0.02^2),   E = 0 at the start

    every step:      score = sum_ij |delta_ij G_ij| / sqrt(out in),   G = dL/d delta, smoothed as in `engine.importance`
    in a round:      the top_h modules with the largest smoothed score gain ranks (see `engine.growing`)

Advance learning: the next pairs of every module, its reserve, train already, with a singular value of 1e-5 that does
not; Adam makes full steps of their tiny gradients, and a new rank is of use at once. A pair and its singular value warm
up anew when they begin to move. When the budget is used up the reserves are switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from loratlas.engine import slots
from loratlas.engine.config import knob
from loratlas.engine.factors import Factors
from loratlas.engine.growing import STD, GrowingConfig, GrowingMethod, Plan
from loratlas.engine.importance import smooth_, update_sensitivity
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View
from loratlas.engine.moments import restarted_rates, run_rate, slot_rates
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import averaged, put_

RESERVE = 1e-5  # singular value of pairs that learn in advance


class IncreLora(GrowingMethod):
    """Buffers, beside those of `engine.growing`: drawn (r_max,), the step at which a pair was drawn (`born` says when
    its singular value began to train); reserve (), the singular value of the reserves now, 0 once they are switched
    off; average, uncertainty (), the smoothed score; peak (2, r_max), for the warm-up of pairs and singular values.
    Derived: seen (), the score of this step so far; there only while one is wanted."""

    name = "increlora"
    params = ("A", "B", "E")
    buffers = (*GrowingMethod.buffers, "drawn", "reserve", "average", "uncertainty", "peak")
    derived = ("seen",)

    def dtypes(self) -> dict[str, torch.dtype]:
        return {**super().dtypes(), "drawn": torch.int64}

    def shapes(self, cfg: IncreLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        own = super().shapes(cfg, r, n_in, n_out)
        room = own["born"]
        return {
            **own,
            **dict.fromkeys(("E", "drawn"), room),
            **dict.fromkeys(("reserve", "average", "uncertainty"), ()),
            "peak": (2, *room),
        }

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        rank = self.start(t)
        t.B[:, :rank].normal_(std=STD)
        if t.cfg.init_weights is False:
            nn.init.kaiming_uniform_(t.A[:rank], a=5**0.5)
            nn.init.kaiming_uniform_(t.B[:, :rank], a=5**0.5)
            t.E[:rank].fill_(1.0)
        return None

    def factors(self, t: View) -> Factors:
        live = slots.alive(t)
        values = t.E * live + t.reserve * (slots.alive(t, t.cfg.ahead()) - live)
        up = t.B * (values * self.share(t))
        watch = None if t.seen is None else partial(_watch, t.seen, t.A.detach(), up.detach())
        return Factors(t.A, up, observe=watch)

    def exported_rank(self, t: View) -> int:
        ahead = t.cfg.ahead() if float(t.reserve) else 0
        return min(int(t.rank) + ahead, len(t.born))

    # ------------------------------------------------------------------------------------------------- the schedule

    def cadence(self, views: Sequence[View], budget: int, warmup: int, total_steps: int) -> tuple[int, int]:
        """Growth ends by the middle of the run, with an eighth of the modules in a round or as many as that needs."""
        cfg = views[0].cfg
        grants = -(-(budget - sum(min(cfg.init_r, len(t.born)) for t in views)) // cfg.growth())
        half = max(1, total_steps // 2 - warmup)
        fewest = -(-grants // max(1, half // (cfg.incre_interval or 1))) if total_steps else 0
        most = min(len(views), cfg.top_h or max(1, len(views) // 8, fewest))
        return cfg.incre_interval or max(1, half // max(1, -(-grants // most))), most

    def chosen(self, cfg: IncreLoraConfig, plan: Plan, g: int, left: int, total_steps: int) -> int:
        return min(plan.most, left)

    def scores(self, views: Sequence[View]) -> Tensor:
        return torch.stack([t.average * t.uncertainty for t in views])

    # --------------------------------------------------------------------------------------------------- the steps

    def begin(self, views: Sequence[View], ctx: StepContext) -> None:
        super().begin(views, ctx)
        for t in views if ctx.step == 0 else ():
            for name in ("drawn", "reserve", "average", "uncertainty", "peak"):
                getattr(t, name).zero_()
        self.watch(views, ctx)

    def watch(self, views: Sequence[View], ctx: StepContext) -> None:
        """Let the next step gather scores, if a round to come needs them."""
        cfg, plan, g = views[0].cfg, self.plan(views, ctx.total_steps), ctx.step
        coming = plan.next_round(g)
        wanted = coming < (ctx.total_steps or math.inf) and coming - g < (cfg.score_window or math.inf)
        wanted = wanted and self.left(views, plan) > 0
        for t in views:
            store = t.layer.store("seen")
            if wanted:
                store[t.adapter] = torch.zeros_like(t.average)
            elif t.adapter in store:
                del store[t.adapter]

    def slotted(self, t: View) -> Sequence[tuple[Tensor, int, Tensor]]:
        return [(t.A, 0, t.drawn), (t.B, 1, t.drawn), (t.E, 0, t.born)]

    def corrections(self, views: Sequence[View], ctx: StepContext) -> list[Callable[[], None]]:
        cfg, ages = views[0].cfg, super().corrections(views, ctx)
        if not cfg.restart_warmup:
            return ages
        warmup = self.plan(views, ctx.total_steps).interval if cfg.slot_warmup is None else cfg.slot_warmup
        sizes, run = [len(t.born) for t in views], run_rate(ctx.group(views[0].A))
        begun = torch.stack((torch.cat([t.drawn for t in views]), torch.cat([t.born for t in views])))
        peaks = torch.cat([t.peak for t in views], dim=1)
        pairs, values = restarted_rates(ctx.step, begun, peaks, run, warmup)
        torch._foreach_copy_([t.peak for t in views], list(peaks.split(sizes, dim=1)))
        rates = []
        for t, pair, value in zip(views, pairs.split(sizes), values.split(sizes), strict=True):
            rates += [(t.A, 0, pair), (t.B, 1, pair), (t.E, 0, value)]
        return [*ages, slot_rates(rates)]

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        if views[0].seen is not None:
            scores = list(averaged(torch.stack([t.seen for t in views])).unbind())
            average, uncertainty = [t.average for t in views], [t.uncertainty for t in views]
            smooth_(scores, average, uncertainty, views[0].cfg.beta1, views[0].cfg.beta2)
        super().before_step(views, ctx)

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        super().after_step(views, ctx)
        cfg = views[0].cfg
        if ctx.step == 1 and cfg.advance_learn and self.left(views, self.plan(views, ctx.total_steps)) > 0:
            generator = ctx.generator(cfg.seed)
            for t in views:
                self.draw(t, int(t.rank), ctx, generator)
                t.reserve.fill_(RESERVE)
        if cfg.allocation == "exact" and ctx.step == ctx.total_steps:
            self.close(views, ctx)  # should the budget not be used up
        self.watch(views, ctx)

    def grown(self, views: Sequence[View], left: int, ctx: StepContext) -> None:
        if left == 0:  # not where the official rule has gone past the budget: that code then keeps the reserves
            self.close(views, ctx)

    def grow(self, t: View, gain: int, ctx: StepContext, generator: torch.Generator) -> None:
        first = min(int(t.rank) + t.cfg.ahead(), len(t.born))
        alive = slots.wake(t, gain, ctx)
        put_(t.E, 0, alive, t.average.new_full(alive.shape, RESERVE if t.cfg.advance_learn else 0.0))
        self.draw(t, first, ctx, generator)

    def draw(self, t: View, first: int, ctx: StepContext, generator: torch.Generator) -> None:
        """New pairs in the slots from `first` to the end of the reserve."""
        new = torch.arange(first, min(int(t.rank) + t.cfg.ahead(), len(t.born)), device=t.drawn.device)
        slots.fill(t.A, 0, new, STD, generator)
        slots.fill(t.B, 1, new, STD, generator)
        t.drawn[new] = ctx.step

    def close(self, views: Sequence[View], ctx: StepContext) -> None:
        """Switch the reserves off. Their pairs go with them, but "official" lets the penalty see those to the end."""
        for t in views:
            t.reserve.zero_()
            if t.cfg.allocation == "official":
                continue
            dead = torch.arange(int(t.rank), len(t.born), device=t.drawn.device)
            t.drawn[dead] = 0
            for param, dim in ((t.A, 0), (t.B, 1)):
                slots.clear(param, dim, dead)
                ctx.reset_state(param, dim, dead)

    def used(self, t: View) -> Tensor:
        return torch.maximum(slots.alive(t), slots.alive(t, t.cfg.ahead()) * (t.drawn > 0))


def _watch(seen: Tensor, down: Tensor, up: Tensor, g: Tensor, x: Tensor) -> None:
    """Add the score of a backward pass to `seen`, unless an overflow spoils it, whose step a GradScaler skips.

    As gradients do, scores add up over micro-batches, whose losses are divided by their number, and are averaged over
    ranks.
    """
    score = update_sensitivity(g, x, down, up) / (up.shape[0] * down.shape[1]) ** 0.5
    seen.add_(torch.where(score.isfinite(), score, 0.0))


@adapter(IncreLora())
@dataclass
class IncreLoraConfig(GrowingConfig):
    """IncreLoRA. Training needs `loratlas.attach(model, optimizer, total_steps=N)` or `LifecycleCallback` in a Trainer;
    without it every module stays at rank init_r. Needs Adam or AdamW: the gradients of a reserve are tiny.

    Raises:
        UserError: a field is out of its range.
    """

    top_h: int | None = knob(
        None, "Modules that gain rank in a round; None: an eighth of them, or as many as the length of the run needs."
    )
    advance_learn: bool = knob(True, "Let the next pairs of every module train before they are added.")
    restart_warmup: bool = knob(
        True, "Let every new slot's learning rate warm up anew and then fall as the run's does."
    )
    slot_warmup: int | None = knob(None, "Steps of that warm-up; None: as many as from round to round.")
    beta1: float = knob(0.85, "Moving average of the score.")
    beta2: float = knob(0.85, "Moving average of its uncertainty.")
    score_window: int | None = knob(
        None, "Gather scores only in so many steps before a round, which saves time; None: in every step."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")
        for name in ("top_h", "score_window"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1")
        self._require(self.slot_warmup is None or self.slot_warmup >= 0, "slot_warmup", "at least 0")

    def ahead(self) -> int:
        """Slots of the reserve."""
        return self.growth() if self.advance_learn else 0
