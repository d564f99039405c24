"""DiffoRA (arXiv 2502.08905): a search that decides which modules get a low-rank update at all.

    search:   y = x W^T + sigma(a_m) s (x A^T) B^T       one logit a_m for every module m
              odd steps after the warm-up     a <- Adam(a, dL/da),  weights rest
              even steps                      weights as ever,      a rests
    then:     of every layer (or of all modules) those with the largest a keep their pair, with gate 1;
              the others have none, or share one pair a kind of module

The two kinds of steps see different halves of the data (`search_data.SearchSampler`). As the up factor is
sigma(a) s B, dL/da = <dL/dB, B> (1 - sigma(a)): the logits need no backward pass of their own, and gradients that are
accumulated, averaged over ranks or clipped are so for them too. First order: the weights are taken as they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.adapters.search_data import SearchSampler, plan_of
from loratlas.engine import rank_log
from loratlas.engine.budget import largest
from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.lifecycle import StepContext, gradient
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.phases import start_again
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import gather, local, whole, write_
from loratlas.errors import UserError

SEARCHING, OWN, NONE, SHARED = range(4)  # what `role` says of a module; SHARED + i: it shares pair number i
_EPS = 1e-8  # of the logits' Adam


class DiffoRA(LowRankMethod):
    """Beside A and B: logit (), arch_mean () and arch_square () its Adam moments, factor () of the update, role ()."""

    name = "diffora"
    kinds = ("linear", "conv1d", "conv2d")
    params = ("A", "B")
    buffers = ("logit", "arch_mean", "arch_square", "factor", "role", rank_log.LOG)
    growing = (rank_log.LOG,)

    def shapes(self, cfg: DiffoRAConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        scalars = dict.fromkeys(("logit", "arch_mean", "arch_square", "factor", "role"), ())
        return {"A": (r, n_in), "B": (n_out, r), **scalars, rank_log.LOG: (0, 2)}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"role": torch.int64, rank_log.LOG: torch.int64}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        nn.init.kaiming_uniform_(t.A, a=5**0.5)
        if t.cfg.init_weights is False:
            nn.init.kaiming_uniform_(t.B, a=5**0.5)
        t.factor.fill_(0.5)  # sigma(0)
        rank_log.note(t, 0, t.r)
        return None

    def factors(self, t: View) -> Factors:
        return Factors(t.A, t.B * (t.factor * t.scaling))

    def exported(self, t: View) -> Factors:
        return self.factors(t) if t.factor != 0 else Factors(t.A[:0], t.B[:, :0])

    # -------------------------------------------------------------------------------------------------- training

    def order(
        self,
        cfg: DiffoRAConfig,
        rows: int,
        per_step: int,
        total_steps: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> SearchSampler:
        return SearchSampler(rows, per_step, total_steps, cfg, seed=seed, lengths=lengths)

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        if not ctx.total_steps:
            raise UserError("DiffoRA searches for a part of the run: pass attach(..., total_steps=N) or use a Trainer.")
        plan = plan_of(views[0].cfg, ctx.total_steps)
        if int(views[0].role) != SEARCHING:
            return  # a further stage of an adapter that has chosen
        if plan.search > ctx.total_steps or plan.warmup >= plan.search:
            raise UserError(
                f"DiffoRA: a search of {plan.search} steps, {plan.warmup} of them warm-up, does not fit into a run of "
                f"{ctx.total_steps}: choose search_steps and warmup_steps."
            )

    def begin(self, views: Sequence[View], ctx: StepContext) -> None:
        roles = torch.stack([t.role for t in views]).tolist()
        ctx.memo[self] = roles
        self.freeze(views, roles)

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        roles, plan = ctx.memo[self], plan_of(views[0].cfg, ctx.total_steps)
        if roles[0] == SEARCHING:
            if plan.moves_logits(ctx.step):
                self.move_logits(views, ctx, (ctx.step - plan.warmup + 1) // 2)
                for group in ctx.optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = None  # the weights rest, a classifier's as well
            return
        for t, role in zip(views, roles, strict=True):
            if role == NONE:
                t.A.grad = t.B.grad = None
        for members in _shared(views, roles):
            for name in self.params:
                _add_gradients([getattr(t, name) for t in members])

    def move_logits(self, views: Sequence[View], ctx: StepContext, number: int) -> None:
        """Step `number` (from 1) of the logits' Adam, with coupled weight decay."""
        cfg, ups = views[0].cfg, [t.B for t in views]
        grads = [gradient(up, ctx) for up in ups]
        parts = [local(up.detach()) for up in ups]
        products = [torch.zeros_like(p) if g is None else p * local(g) for p, g in zip(parts, grads, strict=True)]
        logits, first, second = ([getattr(t, name) for t in views] for name in ("logit", "arch_mean", "arch_square"))
        slopes = [p.sum() * torch.sigmoid(-logit) for p, logit in zip(gather(products, ups), logits, strict=True)]
        torch._foreach_add_(slopes, logits, alpha=cfg.arch_weight_decay)
        torch._foreach_lerp_(first, slopes, 1 - cfg.arch_beta1)
        torch._foreach_mul_(second, cfg.arch_beta2)
        torch._foreach_addcmul_(second, slopes, slopes, 1 - cfg.arch_beta2)
        widths = torch._foreach_sqrt(second)
        torch._foreach_div_(widths, math.sqrt(1 - cfg.arch_beta2**number))
        torch._foreach_add_(widths, _EPS)
        torch._foreach_addcdiv_(logits, first, widths, -cfg.arch_lr / (1 - cfg.arch_beta1**number))
        for t in views:
            t.factor.copy_(torch.sigmoid(t.logit))

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        if ctx.memo[self][0] == SEARCHING and ctx.step >= plan_of(views[0].cfg, ctx.total_steps).search:
            self.decide(views, ctx)

    # -------------------------------------------------------------------------------------------------- decision

    def decide(self, views: Sequence[View], ctx: StepContext) -> None:
        """Choose the modules, give them and the shared ones their start, and let go of the rest."""
        cfg = views[0].cfg
        scores = ctx.agree(torch.stack([t.logit.to(views[0].logit.device) for t in views]))
        for t, score in zip(views, scores, strict=True):
            t.logit.copy_(score)
        roles = choose(scores, [t.layer.path for t in views], cfg)
        if cfg.share_unselected == "per_type":
            roles = pair_up(roles, [(_kind(t.layer.path), tuple(t.A.shape), tuple(t.B.shape)) for t in views])
        for t in views:
            local(t.B.detach()).mul_(t.factor)  # the function stays, gate 1 or not
        for members in _shared(views, roles):
            best = max(members, key=lambda t: float(t.logit))
            for t in members:
                write_(t.A, whole(best.A.detach()))
                write_(t.B, whole(best.B.detach()))
        if cfg.after_search == "retrain":
            self.start_anew(views, roles, ctx)
        for t, role in zip(views, roles, strict=True):
            t.role.fill_(role)
            t.factor.fill_(float(role != NONE))
            rank_log.note(t, ctx.step, 0 if role == NONE else t.r)
            if role != OWN or cfg.after_search == "retrain":
                start_again(ctx.optimizer, (t.A, t.B))
        ctx.memo[self] = roles
        self.freeze(views, roles)

    def start_anew(self, views: Sequence[View], roles: list[int], ctx: StepContext) -> None:
        """LoRA's start for every pair that trains on; one for all that share it."""
        generator, drawn = ctx.generator(views[0].cfg.seed), dict[int, Tensor]()
        for t, role in zip(views, roles, strict=True):
            if role < SHARED or role not in drawn:
                a = torch.empty(t.A.shape)
                nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
                drawn[role] = a
            write_(t.A, drawn[role].to(t.A))
            write_(t.B, torch.zeros(t.B.shape).to(t.B))

    def freeze(self, views: Sequence[View], roles: list[int]) -> None:
        """No gradients for modules without an update. Under DistributedDataParallel, which would wait for them, they
        are only dropped."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return
        for t, role in zip(views, roles, strict=True):
            if role == NONE:
                t.A.requires_grad_(False)
                t.B.requires_grad_(False)


def choose(scores: Tensor, paths: Sequence[str], cfg: DiffoRAConfig) -> list[int]:
    """OWN for the modules of the largest scores, exactly as many as the budget has; NONE for the others.

    scores: (modules,). paths: of the modules; their first number says which layer they belong to.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        groups[_layer(path) if cfg.scope == "layer" else ""].append(i)
    roles = [NONE] * len(paths)
    for members in groups.values():
        count = math.ceil(cfg.budget * len(members) - 1e-9) if cfg.budget_modules is None else cfg.budget_modules
        for place in largest(scores[members], count).tolist():
            roles[members[place]] = OWN
    return roles


def pair_up(roles: Sequence[int], kinds: Sequence[object]) -> list[int]:
    """Modules of NONE that are of one kind share a pair; kinds: of each module, name in its layer and shape."""
    numbers: dict[object, int] = {}
    return [
        role if role != NONE else SHARED + numbers.setdefault(kind, len(numbers))
        for role, kind in zip(roles, kinds, strict=True)
    ]


def _layer(path: str) -> str:
    """The path up to its first number: encoder.layer.3 of encoder.layer.3.attention.query; "" if it has none."""
    parts = path.split(".")
    return ".".join(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)])


def _kind(path: str) -> str:
    return path.removeprefix(_layer(path)).removeprefix(".")


def _shared(views: Sequence[View], roles: Sequence[int]) -> list[list[View]]:
    groups: dict[int, list[View]] = defaultdict(list)
    for t, role in zip(views, roles, strict=True):
        if role >= SHARED:
            groups[role].append(t)
    return list(groups.values())


def _add_gradients(params: Sequence[Tensor]) -> None:
    """Give tensors that are one the gradient of that one; the same optimizer then keeps them equal."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return
    total = torch.stack([local(grad) for grad in grads]).sum(0)
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        local(p.grad).copy_(total)


@adapter(DiffoRA())
@dataclass
class DiffoRAConfig(AtlasConfig):
    """DiffoRA. Training needs `loratlas.attach(model, optimizer, total_steps=N)` or `LifecycleCallback` in a Trainer.

    Raises:
        UserError: a field is out of its range.
    """

    budget: float = knob(0.5, "rho: share of the modules that keep an update of their own, rounded up.")
    budget_modules: int | None = knob(None, "How many modules keep one, instead of a share.")
    scope: str = knob("layer", "The budget is that of every 'layer', or 'global': of all modules together.")
    search_steps: int | None = knob(None, "Steps of the search, warm-up included; None: a tenth of the run.")
    warmup_steps: int | None = knob(None, "First steps of the search, for weights alone; None: a fifth of it.")
    search_share: float = knob(0.5, "Share of the rows for the search's steps of the weights; the rest is the logits'.")
    arch_lr: float = knob(1e-3, "Learning rate of the logits, constant.")
    arch_beta1: float = knob(0.5, "First beta of the logits' Adam.")
    arch_beta2: float = knob(0.999, "Second beta of the logits' Adam.")
    arch_weight_decay: float = knob(1e-3, "Weight decay of the logits, in the gradient; it pulls gates to 1/2.")
    share_unselected: str = knob(
        "none", "Modules without an update of their own have 'none', or one pair is shared 'per_type' of module."
    )
    after_search: str = knob(
        "finetune", "Chosen pairs 'finetune' what the search has found, or 'retrain' from a start."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0.0 < self.budget <= 1.0, "budget", "in (0, 1]")
        self._require(self.budget_modules is None or self.budget_modules >= 1, "budget_modules", "at least 1")
        self._require(self.scope in ("layer", "global"), "scope", "'layer' or 'global'")
        self._require(self.search_steps is None or self.search_steps >= 2, "search_steps", "at least 2")
        self._require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "at least 0")
        self._require(0.0 < self.search_share < 1.0, "search_share", "in (0, 1)")
        for name in ("arch_lr", "arch_weight_decay"):
            self._require(getattr(self, name) >= 0.0, name, "at least 0")
        for name in ("arch_beta1", "arch_beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")
        self._require(self.share_unselected in ("none", "per_type"), "share_unselected", "'none' or 'per_type'")
        self._require(self.after_search in ("finetune", "retrain"), "after_search", "'finetune' or 'retrain'")
        self._require(self.init_weights in (True, False), "init_weights", "True or False")
