"""SRLoRA: subspace recomposition in low-rank adaptation (arXiv 2505.12433). No official code is known.

    W ~ U S V^T     | u1 u2 u3 u4 | u5 u6 u7 u8 | u9 ...          principal directions of the pretrained weight
                      `-- r live pairs --' `------ reservoir ------ r_target
    every interval:   score the live pairs, fuse the gamma * r least important ones into the weight,
                      let their slots start again on the next unused directions

The pairs start as PiSSA's. They are scored as in `engine.importance`; at an event the r' = max(1, floor(gamma r)) pairs
with the lowest scores move into the frozen part and their slots are re-seeded with the next directions of the SVD of
the PRETRAINED weight, whose projection leaves the frozen part: the function does not change. r (in + out) parameters
train, up to r_target directions are visited. Everything is kept in difference form (see `engine.pairs`), so W is never
written.

Ours, not the paper's: a start like LoRA's (init_weights="lora"); starting again on the least directions of W, or with
b = 0 on the leading ones of the current gradient (`reservoir`, see `engine.reservoir`), and how long these are
(`fresh_length`); a warm-up of fresh pairs (`fresh_warmup`); fusing the oldest pairs instead of those with the lowest
scores (`select`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loratlas.adapters.srlora_config import GRADIENT, SRLoraConfig
from loratlas.engine import pairs, reservoir
from loratlas.engine.events import Plan
from loratlas.engine.factors import Factors
from loratlas.engine.importance import pair_scores, update_importance
from loratlas.engine.lifecycle import StepContext, gradient
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.moments import age_correction, check_treatment, slot_rates, treat_moments
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import whole
from loratlas.errors import UserError
from loratlas.linalg.factorise import usable_svd
from loratlas.linalg.svd import numerical_rank, top_svd

__all__ = ["GRADIENT", "SRLora", "SRLoraConfig"]

SCORES = ("IA", "QA", "IB", "QB")
INTEGERS = ("slot_dir", "born", "cursor", "events", "log")
_INPLACE = ("fuse_mode='inplace'", "fuse_mode='difference'")  # the option and what works without it, for messages


class SRLora(LowRankMethod):
    """Tensors, beside those of `engine.pairs` and `engine.reservoir`: IA, QA (r, in) and IB, QB (out, r) the scores'
    moving averages; slot_dir (r,) which direction a slot carries; born (r,) the step it was seeded at; cursor, events:
    directions used and events done; log (M, 4): step, slot, old and new direction (a running number where directions
    are not those of W)."""

    name = "srlora"
    kinds = ("linear", "conv1d", "conv2d", "embedding")
    params = pairs.TENSORS
    buffers = (*pairs.STARTS, *pairs.HISTORY, *SCORES, *reservoir.BUFFERS, *INTEGERS)
    growing = (*pairs.HISTORY, *reservoir.GROWING, "log")
    derived = ("folded", "probe")

    def shapes(self, cfg: SRLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        spare = self.r_target(cfg, r, (n_out, n_in)) - r
        every = pairs.shapes(r, n_in, n_out)
        from_zero = cfg.sketches and cfg.init_weights == "lora"
        return {
            **({name: every[name] for name in pairs.TENSORS} if from_zero else every),
            **reservoir.shapes(r, spare, n_in, n_out, sketched=cfg.sketches),
            **dict.fromkeys(("IA", "QA"), (r, n_in)),
            **dict.fromkeys(("IB", "QB"), (n_out, r)),
            **dict.fromkeys(("slot_dir", "born"), (r,)),
            **dict.fromkeys(("cursor", "events"), ()),
            "HA": (0, n_in),
            "HB": (n_out, 0),
            "log": (0, 4),
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(INTEGERS, torch.int64)

    @staticmethod
    def r_target(cfg: SRLoraConfig, r: int, shape: tuple[int, int]) -> int:
        """Directions to visit in a layer: r_target clipped to min(out, in), never below r."""
        return max(r, min(cfg.r_target or 4 * r, *shape))

    def on_host(self, cfg: SRLoraConfig) -> tuple[str, ...]:
        return ("RA", "RB") if cfg.reservoir_device == "cpu" else ()

    # ----------------------------------------------------------------------------------------------------- start

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        r_target = self.r_target(t.cfg, t.r, t.op.shape)
        spare = 0 if t.cfg.sketches else r_target - t.r
        if t.cfg.init_weights != "lora" or spare:
            minor = t.cfg.reservoir == "minor"
            u, s, vh = usable_svd(weight(), min(t.op.shape) if minor else t.r + spare, **t.cfg.svd_options())
            if len(s) < t.r:
                return len(s)
            down, up = pairs.principal_factors(u, s, vh, t.scaling)
            rest = torch.arange(len(s) - 1, t.r - 1, -1)[:spare] if minor else slice(t.r, None)
            reservoir.keep(t, down[rest], up[:, rest])
        elif t.r > min(t.op.shape):
            return min(t.op.shape)
        if t.cfg.r_target is not None and t.cfg.r_target > min(t.op.shape):
            warnings.warn(
                f"SRLoRA: r_target={t.cfg.r_target} exceeds the {min(t.op.shape)} directions of a {t.op.shape[0]} x "
                f"{t.op.shape[1]} layer; such layers visit those.",
                stacklevel=2,
            )
        t.slot_dir.copy_(torch.arange(t.r))
        t.cursor.fill_(t.r)
        if t.cfg.init_weights == "lora":
            # as LoRA's, so in an embedding A is the zero factor
            zero, drawn = (t.A, t.B) if t.op.kind == "embedding" else (t.B, t.A)
            zero.zero_()
            nn.init.kaiming_uniform_(drawn, a=5**0.5)
            pairs.start(t, t.A, t.B)
            return None
        pairs.start(t, down[: t.r], up[:, : t.r])
        if not t.cfg.init_weights:
            t.B.add_(torch.randn_like(t.B) * t.B.abs().mean())
        return None

    def derive(self, t: View, weight: Callable[[], Tensor]) -> None:
        if t.cfg.fuse_mode == "inplace":
            pairs.fold(t, weight, *_INPLACE)

    # --------------------------------------------------------------------------------------------------- forward

    def factors(self, t: View) -> Factors:
        return self.looking(t, pairs.with_history(t))

    def pair(self, t: View) -> tuple[nn.Parameter, nn.Parameter]:
        return t.A, t.B

    def working(self, t: View) -> tuple[Tensor, Factors] | None:
        folded = t.folded
        if folded is None:
            return None
        return folded, self.looking(t, pairs.without_start(t))

    @staticmethod
    def looking(t: View, factors: Factors) -> Factors:
        """`factors` whose backward pass gathers the sketch, where the step to come is one of those that do."""
        return factors if t.probe is None else factors._replace(probe=t.probe, sketch=t.sketch)

    def export_rank(self, t: View, total_steps: int) -> int | None:
        """Two ranks for every live pair and every pair that retires, those of the events to come included."""
        plan = self.plan(t, total_steps)
        events = max(0, len(plan.steps(t.cfg.total_step or total_steps)) - int(t.events))
        pairs_to_come = plan.per_event * events
        if t.cfg.exhaustion == "stop" and not t.cfg.sketches:
            pairs_to_come = min(pairs_to_come, t.RA.shape[0])
        ranks = 1 if t.A0 is None else 2
        return min(ranks * (t.r + pairs_to_come) + t.HA.shape[0], *t.op.shape)

    # -------------------------------------------------------------------------------------------------- training

    def plan(self, t: View, total_steps: int) -> Plan:
        r_target = self.r_target(t.cfg, t.r, t.op.shape)
        return Plan.of(t.r, r_target, t.cfg.gamma, t.cfg.total_step or total_steps, t.cfg.schedule)

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        cfg = views[0].cfg
        moves = any(self.plan(t, 1).events for t in views)
        if moves and not (cfg.total_step or ctx.total_steps):
            raise UserError(
                "SRLoRA spreads its events over the whole run: pass attach(..., total_steps=N), or set "
                "SRLoraConfig(total_step=N)."
            )
        for t in views if cfg.fuse_mode == "inplace" else ():
            pairs.refuse_sharded_base(t, *_INPLACE)
        check_treatment(ctx, views[0].A, cfg.optimizer_reset)

    def begin(self, views: Sequence[View], ctx: StepContext) -> None:
        for t in views:
            reservoir.forget(t)
            if ctx.step == 0:  # a further stage has events of its own, and no pair is fresh at its start
                t.events.zero_()
                t.born.zero_()
        self.watch(views, ctx)

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        cfg = views[0].cfg
        pairs_of = [(t.A, t.IA, t.QA) for t in views] + [(t.B, t.IB, t.QB) for t in views]
        live = [(p.detach(), g, i, q) for p, i, q in pairs_of if (g := gradient(p, ctx)) is not None]
        if live:
            params, grads, average, uncertainty = zip(*live, strict=True)
            update_importance(params, grads, average, uncertainty, cfg.beta1, cfg.beta2)
        slots = [(p, dim, t.born) for t in views for p, dim in ((t.A, 0), (t.B, 1))]
        ctx.scratch[self] = corrections = []
        if cfg.optimizer_reset == "corrected":
            corrections += [age_correction(*slot, ctx) for slot in slots]
        if cfg.fresh_warmup:
            ramp = [(p, dim, self.warmed(born, ctx.step, cfg.fresh_warmup)) for p, dim, born in slots]
            corrections.append(slot_rates(ramp))

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        for correct in ctx.scratch[self]:
            correct()
        reservoir.share(views)
        due = [t for t in views if self.due(t, ctx)]
        if due:
            lows = [self.lowest(t, self.plan(t, ctx.total_steps).per_event) for t in due]
            agreed = ctx.agree(torch.cat(lows)).split([len(low) for low in lows])
            for t, low in zip(due, agreed, strict=True):
                self.recompose(t, low, ctx)
        self.watch(views, ctx)

    @staticmethod
    def warmed(born: Tensor, step: int, warmup: int) -> Tensor:
        """(r,) factors of the learning rate: k / (warmup + 1) in the k-th step of a fresh pair, 1 for others."""
        age = (step - born).double()
        return torch.where(born > 0, (age / (warmup + 1)).clamp(max=1.0), torch.ones_like(age))

    def event_steps(self, t: View, total_steps: int) -> range:
        """The steps after which the plan has an event, as far as numbers known before training say."""
        if t.cfg.sketches and t.op.kind == "embedding":
            return range(0)  # its input are ids, which have no directions
        return self.plan(t, total_steps).steps(t.cfg.total_step or total_steps)

    def due(self, t: View, ctx: StepContext) -> bool:
        # the tensors are read (a synchronisation on GPU) only where the plan has an event
        return (
            ctx.step in self.event_steps(t, ctx.total_steps)
            and int(t.events) < self.plan(t, ctx.total_steps).events
            and (t.RA.shape[0] > 0 or t.cfg.exhaustion == "resvd" or t.cfg.sketches)
        )

    def lowest(self, t: View, per_event: int) -> Tensor:
        """Slots of the pairs with the lowest scores, in slot order; ties go to the lower slot."""
        spare = t.RA.shape[0]
        count = min(per_event, spare) if spare else per_event  # nothing spare: exhaustion="resvd" finds new ones
        order = t.born if t.cfg.select == "oldest" else pair_scores(t.IA, t.QA, t.IB, t.QB)
        return order.argsort(stable=True)[:count].sort().values

    def recompose(self, t: View, slots: Tensor, ctx: StepContext) -> None:
        """Fuse the pairs in `slots` and let the slots start again on the next directions."""
        down, up = self.next_directions(t, slots, ctx)
        slots = slots[: down.shape[0]]
        t.events.add_(1)
        if len(slots) == 0:
            return
        new = t.cursor + torch.arange(len(slots), device=slots.device)
        entry = torch.stack((torch.full_like(slots, ctx.step), slots, t.slot_dir[slots], new), dim=1)
        t.grow("log", torch.cat((t.log, entry)))
        pairs.retire(t, slots)
        pairs.reseed(t, slots, down, up)
        t.slot_dir[slots] = new
        t.born[slots] = ctx.step
        t.cursor.add_(len(slots))
        fresh = slots if t.cfg.score_reset == "replaced" else torch.arange(t.r, device=slots.device)
        for name in SCORES:
            getattr(t, name).index_fill_(0 if name.endswith("A") else 1, fresh, 0)
        treat_moments(ctx, t.A, 0, slots, t.cfg.optimizer_reset)
        treat_moments(ctx, t.B, 1, slots, t.cfg.optimizer_reset)
        t.layer.derive(t.adapter)

    def next_directions(self, t: View, slots: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(down, up) of the next directions, one for each of `slots` or fewer."""
        if t.cfg.sketches:
            return reservoir.sketched(t, slots, t.cfg.fresh_length)
        if t.RA.shape[0] == 0:
            return self.redecompose(t, len(slots), ctx)
        return reservoir.take(t, len(slots))

    def redecompose(self, t: View, count: int, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """exhaustion="resvd": the top directions of the frozen part as it is now, W + s (H - B* A*)."""
        frozen = pairs.folded_weight(t, whole(t.layer.base_matrix()))
        triplets = top_svd(frozen, count, **t.cfg.svd_options())
        u, s, vh = map(ctx.agree, triplets)
        usable = numerical_rank(s, *frozen.shape)
        return pairs.principal_factors(u[:, :usable], s[:usable], vh[:usable], t.scaling)

    def watch(self, views: Sequence[View], ctx: StepContext) -> None:
        """Look into the backward passes of the step to come if an event follows within `sketch_steps`."""
        if views[0].cfg.sketches:
            reservoir.watch([(t, self.draw(t, ctx)) for t in views])

    def draw(self, t: View, ctx: StepContext) -> int | None:
        """Number of the probe for the step to come, from what is known on the host; None: nothing to gather."""
        events = self.event_steps(t, ctx.total_steps)
        number = ctx.step // events.step  # of the next event, from 0
        near = number < len(events) and events[number] - ctx.step <= t.cfg.sketch_steps
        return t.cfg.seed + 7919 * number if near else None


adapter(SRLora())(SRLoraConfig)
