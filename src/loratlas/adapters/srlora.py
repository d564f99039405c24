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
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loratlas.engine import pairs
from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.importance import pair_scores, update_importance
from loratlas.engine.lifecycle import StepContext, gradient
from loratlas.engine.method import Factors, LowRankMethod, View
from loratlas.engine.moments import age_correction, check_treatment, treat_moments
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import whole
from loratlas.errors import UserError
from loratlas.linalg.factorise import usable_svd
from loratlas.linalg.svd import numerical_rank, top_svd

SCORES = ("IA", "QA", "IB", "QB")
_INPLACE = ("fuse_mode='inplace'", "fuse_mode='difference'")  # the option and what works without it, for messages


class Plan(NamedTuple):
    """When a layer recomposes: `per_event` pairs, at most `events` times, every `interval` steps."""

    per_event: int
    events: int
    interval: int

    @classmethod
    def of(cls, r: int, r_target: int, gamma: float, total_steps: int, schedule: str) -> Plan:
        """r' = max(1, floor(gamma r)), N_switch = floor((r_target - r) / r'), t_interval = floor(N / N_switch).

        "spread" divides by N_switch + 1, so that the last pairs train as long as the others; with "paper" the last
        event falls on the final step and is skipped.
        """
        per_event = max(1, math.floor(gamma * r + 1e-9)) if gamma > 0 else 0
        events = (r_target - r) // per_event if per_event else 0
        if events <= 0 or total_steps <= 0:
            return cls(per_event, 0, 0)
        parts = events if schedule == "paper" else events + 1
        return cls(per_event, events, max(1, total_steps // parts))


class SRLora(LowRankMethod):
    """Tensors, beside those of `engine.pairs`: IA, QA (r, in) and IB, QB (out, r) the scores' moving averages; RA (k,
    in), RB (out, k) the k directions not used yet, scaled as pairs; slot_dir (r,) which direction a slot carries; born
    (r,) the step
    it was seeded at; cursor, events: directions used and events done; log (M, 4): step, slot, old and new direction."""

    name = "srlora"
    kinds = ("linear", "conv1d", "conv2d", "embedding")
    params = pairs.TENSORS
    buffers = (*pairs.STARTS, *pairs.HISTORY, *SCORES, "RA", "RB", "slot_dir", "born", "cursor", "events", "log")
    growing = (*pairs.HISTORY, "RA", "RB", "log")
    derived = ("folded",)

    def shapes(self, cfg: SRLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        spare = self.r_target(cfg, r, (n_out, n_in)) - r
        return {
            **pairs.shapes(r, n_in, n_out),
            **dict.fromkeys(("IA", "QA"), (r, n_in)),
            **dict.fromkeys(("IB", "QB"), (n_out, r)),
            **dict.fromkeys(("slot_dir", "born"), (r,)),
            **dict.fromkeys(("cursor", "events"), ()),
            "HA": (0, n_in),
            "HB": (n_out, 0),
            "RA": (spare, n_in),
            "RB": (n_out, spare),
            "log": (0, 4),
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(("slot_dir", "born", "cursor", "events", "log"), torch.int64)

    @staticmethod
    def r_target(cfg: SRLoraConfig, r: int, shape: tuple[int, int]) -> int:
        """Directions to visit in a layer: r_target clipped to min(out, in), never below r."""
        return max(r, min(cfg.r_target or 4 * r, *shape))

    def on_host(self, cfg: SRLoraConfig) -> tuple[str, ...]:
        return ("RA", "RB") if cfg.reservoir_device == "cpu" else ()

    # ----------------------------------------------------------------------------------------------------- start

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        wanted = self.r_target(t.cfg, t.r, t.op.shape)
        u, s, vh = usable_svd(weight(), wanted, **t.cfg.svd_options())
        if len(s) < t.r:
            return len(s)
        if t.cfg.r_target is not None and t.cfg.r_target > min(t.op.shape):
            warnings.warn(
                f"SRLoRA: r_target={t.cfg.r_target} exceeds the {min(t.op.shape)} directions of a {t.op.shape[0]} x "
                f"{t.op.shape[1]} layer; such layers visit those.",
                stacklevel=2,
            )
        down, up = pairs.principal_factors(u, s, vh, t.scaling)
        pairs.start(t, down[: t.r], up[:, : t.r])
        t.grow("RA", down[t.r :].to(t.RA).clone())
        t.grow("RB", up[:, t.r :].to(t.RB).clone())
        t.slot_dir.copy_(torch.arange(t.r))
        t.cursor.fill_(t.r)
        if not t.cfg.init_weights:
            t.B.add_(torch.randn_like(t.B) * t.B.abs().mean())
        return None

    def derive(self, t: View, weight: Callable[[], Tensor]) -> None:
        if t.cfg.fuse_mode == "inplace":
            pairs.fold(t, weight, *_INPLACE)

    # --------------------------------------------------------------------------------------------------- forward

    def factors(self, t: View) -> Factors:
        return pairs.with_history(t)

    def pair(self, t: View) -> tuple[nn.Parameter, nn.Parameter]:
        return t.A, t.B

    def working(self, t: View) -> tuple[Tensor, Factors] | None:
        folded = t.folded
        return None if folded is None else (folded, pairs.without_start(t))

    def export_rank(self, t: View, total_steps: int) -> int | None:
        """Two ranks for every live pair and every pair that retires, those of the events to come included."""
        plan, total = self.plan(t, total_steps), t.cfg.total_step or total_steps
        events = max(0, min(plan.events, (total - 1) // plan.interval) - int(t.events)) if plan.events else 0
        spare = t.RA.shape[0]
        pairs_to_come = plan.per_event * events
        if t.cfg.exhaustion == "stop":
            pairs_to_come = min(pairs_to_come, spare)
        return min(2 * t.r + t.HA.shape[0] + 2 * pairs_to_come, *t.op.shape)

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

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        cfg = views[0].cfg
        pairs_of = [(t.A, t.IA, t.QA) for t in views] + [(t.B, t.IB, t.QB) for t in views]
        live = [(p.detach(), g, i, q) for p, i, q in pairs_of if (g := gradient(p, ctx)) is not None]
        if live:
            params, grads, average, uncertainty = zip(*live, strict=True)
            update_importance(params, grads, average, uncertainty, cfg.beta1, cfg.beta2)
        if cfg.optimizer_reset == "corrected":
            slots = [(p, dim, t.born) for t in views for p, dim in ((t.A, 0), (t.B, 1))]
            ctx.scratch[self] = [age_correction(*slot, ctx) for slot in slots]

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        for correct in ctx.scratch.get(self, ()):
            correct()
        due = [t for t in views if self.due(t, ctx)]
        if not due:
            return
        lows = [self.lowest(t, self.plan(t, ctx.total_steps).per_event) for t in due]
        agreed = ctx.agree(torch.cat(lows)).split([len(low) for low in lows])
        for t, low in zip(due, agreed, strict=True):
            self.recompose(t, low, ctx)

    def due(self, t: View, ctx: StepContext) -> bool:
        plan = self.plan(t, ctx.total_steps)
        total = t.cfg.total_step or ctx.total_steps
        # the tensors are read (a synchronisation on GPU) only at a multiple of the interval
        return (
            plan.events > 0
            and ctx.step % plan.interval == 0
            and ctx.step < total
            and int(t.events) < plan.events
            and (t.RA.shape[0] > 0 or t.cfg.exhaustion == "resvd")
        )

    def lowest(self, t: View, per_event: int) -> Tensor:
        """Slots of the pairs with the lowest scores, in slot order; ties go to the lower slot."""
        spare = t.RA.shape[0]
        count = min(per_event, spare) if spare else per_event  # nothing spare: exhaustion="resvd" finds new ones
        scores = pair_scores(t.IA, t.QA, t.IB, t.QB)
        return scores.argsort(stable=True)[:count].sort().values

    def recompose(self, t: View, slots: Tensor, ctx: StepContext) -> None:
        """Fuse the pairs in `slots` and let the slots start again on the next directions."""
        down, up = self.next_directions(t, len(slots), ctx)
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

    def next_directions(self, t: View, count: int, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(down, up) of the next `count` unused directions, taken out of the reservoir."""
        if t.RA.shape[0] == 0:
            return self.redecompose(t, count, ctx)
        down, up = t.RA[:count].to(t.A.device), t.RB[:, :count].to(t.B.device)
        t.grow("RA", t.RA[count:].clone())
        t.grow("RB", t.RB[:, count:].clone())
        return down, up

    def redecompose(self, t: View, count: int, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """exhaustion="resvd": the top directions of the frozen part as it is now, W + s (H - B* A*)."""
        frozen = pairs.folded_weight(t, whole(t.layer.base_matrix()))
        triplets = top_svd(frozen, count, **t.cfg.svd_options())
        u, s, vh = map(ctx.agree, triplets)
        usable = numerical_rank(s, *frozen.shape)
        return pairs.principal_factors(u[:, :usable], s[:usable], vh[:usable], t.scaling)


@adapter(SRLora())
@dataclass
class SRLoraConfig(SvdConfig):
    """SRLoRA. Defaults are the sheet's; what the paper does not say is marked as a choice in the docs.

    Training needs `loratlas.attach(model, optimizer, total_steps=N)` or `LifecycleCallback` in a Trainer; without it
    the adapter trains as PiSSA. Use weight_decay=0: decay pulls b a towards 0 and so takes principal directions out of
    W.

    Raises:
        UserError: a field is out of its range.
    """

    r_target: int | None = knob(
        None, "Directions visited in total, at least r; None: 4 r. Clipped to what a layer has."
    )
    gamma: float = knob(0.5, "Fraction of the pairs recomposed at an event; 0 means none (PiSSA).")
    beta1: float = knob(0.85, "Moving average of the sensitivity.")
    beta2: float = knob(0.85, "Moving average of the uncertainty.")
    schedule: str = knob(
        "spread", "'spread': the last pairs train as long as the others. 'paper': interval N / N_switch."
    )
    total_step: int | None = knob(None, "Optimizer steps of the run; None: from attach or the Trainer.")
    score_reset: str = knob("all", "After an event forget the scores of 'all' pairs or of the 'replaced' ones.")
    optimizer_reset: str = knob(
        "keep", "Adam moments of re-seeded slots: 'keep', 'zero', 'corrected' (as a fresh Adam) or 'mean_v'."
    )
    fuse_mode: str = knob(
        "difference",
        "'difference': exact everywhere. 'inplace': train over a dense working copy of W (faster, more memory).",
    )
    exhaustion: str = knob(
        "stop", "When a layer has no unused direction left: 'stop' its events, or 'resvd' of its frozen part (ours)."
    )
    reservoir_device: str | None = knob(
        None, "'cpu' keeps the unused directions in host memory; None: beside the weight."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.r_target is None or self.r_target >= self.r, "r_target", f"at least r={self.r}")
        self._require(0.0 <= self.gamma <= 1.0, "gamma", "in [0, 1]")
        for name in ("beta1", "beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")
        self._require(self.total_step is None or self.total_step >= 1, "total_step", "at least 1")
        for name, allowed in _CHOICES.items():
            self._require(getattr(self, name) in allowed, name, "one of " + ", ".join(map(str, allowed)))


_CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "init_weights": (True, False),
    "schedule": ("spread", "paper"),
    "score_reset": ("all", "replaced"),
    "optimizer_reset": ("keep", "zero", "corrected", "mean_v"),
    "fuse_mode": ("difference", "inplace"),
    "exhaustion": ("stop", "resvd"),
    "reservoir_device": (None, "cpu"),
}
