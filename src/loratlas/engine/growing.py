"""Methods whose rank grows while training, here more and there less, until a budget for all modules is used up.

    delta = s r / (R + 1e-5) * up @ down,      R: the module's rank now, at most r_max (see `slots`)

    step g = 0, 1, ... of T:    g > warmup, g % interval == 0, budget left:   a round of growth

In a round the modules with the best scores gain `incre_rank_num` ranks each. It is decided before the optimizer's step
and happens after it, so that no step moves what it has no gradient for. The scaling shrinks as R grows: with
lora_alpha = a it is a / R whatever r is, and a module of the average rank r has that of a LoRA.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loratlas.engine import slots
from loratlas.engine.budget import ALLOCATIONS, growth
from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.moments import age_correction
from loratlas.engine.orthogonality import orthogonality
from loratlas.errors import UserError

EPSILON = 1e-5  # the official codes divide by R + 1e-5
STD = 0.02  # of every random start


class Plan(NamedTuple):
    """Rounds of growth, in which at most `most` modules gain rank, at the steps g > `warmup` that are multiples of
    `interval`, until all modules together have `budget` ranks."""

    warmup: int
    interval: int
    most: int
    budget: int

    def due(self, g: int) -> bool:
        return g > self.warmup and g % self.interval == 0

    def next_round(self, g: int) -> int:
        """The first round at or after g."""
        return -(-max(g, self.warmup + 1) // self.interval) * self.interval


class GrowingMethod(LowRankMethod):
    """Subclasses score the modules, say how many grow in a round, and what a new slot starts from.

    schedule: the options that say when to grow, whatever the length of the run.

    Buffers beside those of `slots`: budget (), once training has begun the ranks of all modules together at its end.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv2d")
    params: ClassVar[tuple[str, ...]] = ("A", "B")
    buffers: ClassVar[tuple[str, ...]] = (*slots.BUFFERS, "budget")
    growing: ClassVar[tuple[str, ...]] = ("rank_log",)
    schedule: ClassVar[tuple[str, ...]] = ("init_warmup", "incre_interval")

    def dtypes(self) -> dict[str, torch.dtype]:
        return {**slots.INTEGERS, "budget": torch.int64}

    def shapes(self, cfg: Any, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        room = min(4 * r, n_in, n_out) if cfg.r_max is None else max(r, cfg.r_max)
        return {"A": (room, n_in), "B": (n_out, room), **slots.shapes(room), "budget": ()}

    def start(self, t: View) -> int:
        """Let the layer begin; returns its rank."""
        rank = min(t.cfg.init_r, len(t.born))
        slots.start(t, rank)
        t.A[:rank].normal_(std=STD)
        return rank

    def share(self, t: View) -> Tensor:
        """The scaling s r / (R + 1e-5) of the layer at its rank now, ()."""
        return t.scaling * t.r / (t.rank.to(t.A.dtype) + EPSILON)

    def exported(self, t: View) -> Factors:
        live, every = self.exported_rank(t), self.factors(t)
        return Factors(every.down[:live], every.up[:, :live])

    def exported_rank(self, t: View) -> int:
        """How many slots, from the first on, add to the update."""
        return int(t.rank)

    # ------------------------------------------------------------------------------------------------- the schedule

    def plan(self, views: Sequence[View], total_steps: int) -> Plan:
        cfg = views[0].cfg
        budget = min(sum(len(t.born) for t in views), cfg.target_total_rank or sum(t.r for t in views))
        warmup = total_steps // 10 if cfg.init_warmup is None else cfg.init_warmup
        return Plan(warmup, *self.cadence(views, budget, warmup, total_steps), budget)

    def cadence(self, views: Sequence[View], budget: int, warmup: int, total_steps: int) -> tuple[int, int]:
        """(steps from round to round, modules that grow in one at most)."""
        raise NotImplementedError

    def chosen(self, cfg: Any, plan: Plan, g: int, left: int, total_steps: int) -> int:
        """How many modules grow in the round at step g, with `left` ranks of the budget to go."""
        raise NotImplementedError

    def scores(self, views: Sequence[View]) -> Tensor:
        """(modules,) by which those that grow are chosen. Called in rounds only."""
        raise NotImplementedError

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        cfg, total = views[0].cfg, ctx.total_steps
        if not total and any(getattr(cfg, name) is None for name in self.schedule):
            raise UserError(
                f"{self.name} spreads its growth over the run: pass attach(..., total_steps=N), or set "
                f"{', '.join(self.schedule)}."
            )
        plan = self.plan(views, total)
        if ctx.step > 0:
            planned = int(views[0].budget)
            if planned and planned != plan.budget:
                raise UserError(
                    f"{self.name}: the run was planned for {planned} ranks in all and goes on with {plan.budget}: "
                    "resume it with the r and target_total_rank it had, or begin a new stage with restart=True."
                )
            return
        ranks = sum(torch.stack([t.rank for t in views]).tolist())
        if plan.budget < ranks:
            raise UserError(
                f"{self.name}: {len(views)} modules start with {ranks} ranks in all, more than the {plan.budget} they "
                "may end with: raise r or target_total_rank, or lower init_r."
            )
        reached = self.reach(plan, ranks, cfg, total) if total else plan.budget
        if reached < plan.budget:
            message = (
                f"{self.name}: in {total} steps its rounds of growth, every {plan.interval} after step {plan.warmup}, "
                f"get from {ranks} to {reached} of the {plan.budget} ranks of its budget: "
            )
            if cfg.init_warmup is not None or cfg.incre_interval is not None:
                raise UserError(f"{message}lower init_warmup or incre_interval, or train longer.")
            warnings.warn(f"{message}train longer.", stacklevel=2)

    def reach(self, plan: Plan, ranks: int, cfg: Any, total_steps: int) -> int:
        """Ranks of all modules after `total_steps` steps, if those that are chosen have room."""
        g = plan.next_round(0)
        while g < total_steps and ranks < plan.budget:
            left = plan.budget - ranks
            ranks += min(left, cfg.growth() * self.chosen(cfg, plan, g, left, total_steps))
            g += plan.interval
        return ranks

    # --------------------------------------------------------------------------------------------------- the steps

    def begin(self, views: Sequence[View], ctx: StepContext) -> None:
        if ctx.step > 0:
            return
        budget = self.plan(views, ctx.total_steps).budget
        for t in views:  # what an earlier stage of training has left counts from here on
            t.budget.fill_(budget)
            t.born.zero_()
            t.grow("rank_log", t.rank_log[:0])
            slots.note(t, 0)

    def slotted(self, t: View) -> Sequence[tuple[Tensor, int, Tensor]]:
        """(parameter, slot dimension, (slots,) step at which each began to move) of all that has slots."""
        return [(t.A, 0, t.born), (t.B, 1, t.born)]

    def corrections(self, views: Sequence[View], ctx: StepContext) -> list[Callable[[], None]]:
        """What lets new slots move as parameters of their own would; called before the step, run after it."""
        return [age_correction(*slotted, ctx) for t in views for slotted in self.slotted(t)]

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        plan, g = self.plan(views, ctx.total_steps), ctx.step - 1
        gains = self.gains(views, plan, ctx) if plan.due(g) else None
        ctx.scratch[self] = gains, self.corrections(views, ctx)

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        gains, corrections = ctx.scratch[self]
        for correct in corrections:
            correct()
        if gains is None:
            return
        generator = ctx.generator(views[0].cfg.seed)
        for t, gain in zip(views, gains, strict=True):
            if gain > 0:
                self.grow(t, gain, ctx, generator)
        self.grown(views, self.left(views, self.plan(views, ctx.total_steps)), ctx)

    def gains(self, views: Sequence[View], plan: Plan, ctx: StepContext) -> list[int] | None:
        """The ranks that each module gains in this step's round; None once the budget is used up."""
        cfg, ranks = views[0].cfg, torch.stack([t.rank for t in views]).tolist()
        left = plan.budget - sum(ranks)
        if left <= 0:
            return None
        scores, room = self.scores(views), [len(t.born) for t in views]
        chosen = self.chosen(cfg, plan, ctx.step - 1, left, ctx.total_steps)
        found = growth(scores, ranks, room, cfg.growth(), chosen, left, cfg.allocation)
        return ctx.agree(torch.tensor(found, device=scores.device)).tolist()

    def left(self, views: Sequence[View], plan: Plan) -> int:
        """Ranks of the budget that no module has yet."""
        return plan.budget - int(torch.stack([t.rank for t in views]).sum())

    def grow(self, t: View, gain: int, ctx: StepContext, generator: torch.Generator) -> None:
        """Give the layer `gain` more live slots."""
        raise NotImplementedError

    def grown(self, views: Sequence[View], left: int, ctx: StepContext) -> None:
        """Runs after a round, which has left `left` ranks of the budget."""

    # --------------------------------------------------------------------------------------------------- the penalty

    def adds_loss(self, cfg: Any) -> bool:
        return cfg.orth_reg_weight > 0.0

    def extra_loss(self, views: Sequence[View]) -> Tensor:
        used = [self.used(t) for t in views]
        return views[0].cfg.orth_reg_weight * orthogonality([t.A for t in views], [t.B for t in views], used)

    def used(self, t: View) -> Tensor:
        """(r_max,) ones for the slots that the penalty sees."""
        return slots.alive(t)


@dataclass
class GrowingConfig(AtlasConfig):
    """What the methods with a growing rank share.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(8, "Average rank of the modules at the end of growth: the budget is r times their number.")
    target_total_rank: int | None = knob(None, "The budget, ranks of all modules together; None: r for each.")
    r_max: int | None = knob(
        None, "Largest rank of a module, for which its tensors have room; None: 4 r, at most min(out, in)."
    )
    init_r: int = knob(1, "Rank of every module at the start.")
    init_warmup: int | None = knob(
        None, "Steps before the first round of growth; None: a tenth of the run (the papers' are absolute numbers)."
    )
    incre_interval: int | None = knob(None, "Steps from round to round; None: by the length of the run.")
    incre_rank_num: int | None = knob(None, "Ranks that a module gains in a round; None: r / 2.")
    orth_reg_weight: float = knob(0.1, "Weight of the penalty that keeps the rows of A and columns of B orthonormal.")
    allocation: str = knob(
        "exact",
        "'exact': as many modules grow as a round has, within the budget. 'official': all modules that reach the "
        "threshold, as in the official code, which ties and the last round can take past the budget.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.init_weights in (True, False), "init_weights", "True or False")
        self._require(1 <= self.init_r <= self.r, "init_r", f"between 1 and r={self.r}")
        self._require(self.r_max is None or self.r_max >= self.r, "r_max", f"at least r={self.r}")
        for name in ("target_total_rank", "incre_interval", "incre_rank_num"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1")
        self._require(self.init_warmup is None or self.init_warmup >= 0, "init_warmup", "at least 0")
        self._require(self.orth_reg_weight >= 0.0, "orth_reg_weight", "at least 0")
        self._require(self.allocation in ALLOCATIONS, "allocation", f"one of {', '.join(ALLOCATIONS)}")

    def growth(self) -> int:
        """Ranks that a module gains in a round."""
        return self.incre_rank_num or max(1, self.r // 2)
