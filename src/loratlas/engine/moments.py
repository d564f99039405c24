"""Optimizer state of slices that were written anew while the rest of their tensor trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loratlas.engine.lifecycle import StepContext
from loratlas.engine.sharded import along, local, put_, whole
from loratlas.errors import UserError

LONGEST_AGE = 5000  # steps after which a fresh slice's Adam no longer differs from the tensor's (c_k within 1 %)


def check_treatment(ctx: StepContext, param: Tensor, how: str) -> None:
    """Raise `UserError` if the optimizer keeps nothing of `param` that `treat_moments` could treat in that way.

    An optimizer whose moments are not those of the parameter's own slices says so with `slot_moments=False` in the
    parameter's group.
    """
    group, name = ctx.group(param), type(ctx.optimizer).__name__
    if how != "keep" and not group.get("slot_moments", True):
        raise UserError(
            f"optimizer_reset={how!r} treats the moments of single pairs, of which {name} keeps none as it is set up: "
            "choose 'keep'."
        )
    if how == "corrected" and "betas" not in group:
        raise UserError(
            f"optimizer_reset='corrected' is exact for Adam and AdamW only, not for {name}: choose 'keep', 'zero' or "
            "'mean_v'."
        )


def treat_moments(ctx: StepContext, param: Tensor, dim: int, slots: Tensor, how: str) -> None:
    """Treat the moments of the slices `slots` of `param` along `dim` after they were re-seeded.

    "keep": leave them. "zero" and "corrected": zero every state tensor shaped like the parameter, keep the tensor-wide
    step count ("corrected" also rescales the following updates, see `age_correction`). "mean_v": first moment zero,
    second moment the mean over the slices that were not re-seeded, zero if there are none. All in place.
    """
    if how == "keep":
        return
    ctx.reset_state(param, dim, slots)
    second = ctx.state(param).get("exp_avg_sq")
    if how != "mean_v" or not isinstance(second, Tensor):
        return
    moments = whole(second)
    slots = slots.to(moments.device)
    survives = torch.ones(param.shape[dim], dtype=torch.bool, device=slots.device).index_fill_(0, slots, False)
    survivors = moments.index_select(dim, survives.nonzero().flatten())
    if survivors.shape[dim]:
        mean = survivors.mean(dim, keepdim=True)
        put_(second, dim, slots, mean.repeat_interleave(len(slots), dim))


def age_correction(param: Tensor, dim: int, born: Tensor, ctx: StepContext) -> Callable[[], None]:
    """Call before the step; the returned function, called after it, makes fresh slices move as under a fresh Adam.

    Adam divides by 1 - beta^t with the tensor's step count t, a slice whose moments were zeroed k <= t steps ago needs
    k. Its change is multiplied, entry by entry, by

        (1 - beta1^t) / (1 - beta1^k) * (sqrt(v / (1 - beta2^t)) + eps) / (sqrt(v / (1 - beta2^k)) + eps)

    with its second moment v. Decoupled weight decay is not part of the change. Optimizers that count no steps, such as
    SGD, treat slices of every age alike and need no correction; those whose moments are of no single slice (see
    `check_treatment`) can have none.

    Args:
        param: the parameter; dim: its slot dimension.
        born: (slots,) step at which a slot was re-seeded, 0 for slots that were not.
    """
    # what a rank holds is corrected where it lies: nothing is sent, however many slices are fresh
    part = local(param.detach())
    born = along(param, dim, born)
    age = ctx.step - born
    fresh = ((born > 0) & (age <= LONGEST_AGE)).nonzero().flatten()
    if len(fresh) == 0:
        return lambda: None
    before = part.index_select(dim, fresh)
    k = age[fresh].to(torch.float64)

    def correct() -> None:
        group, state = ctx.group(param), ctx.state(param)
        second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if not group.get("slot_moments", True) or "betas" not in group or "step" not in state or second is None:
            return
        beta1, beta2 = (float(beta) for beta in group["betas"])
        t = float(state["step"])
        own = k.clamp(max=t)  # moments that were not loaded with the adapter are younger than its slices
        c = _along(((1 - beta1**t) / (1 - beta1**own)).to(part.dtype), part, dim)
        bias = _along(torch.sqrt(1 - beta2**own).to(part.dtype), part, dim)
        root = local(second).index_select(dim, fresh).sqrt_()
        c = c * (root / (1 - beta2**t) ** 0.5 + group["eps"]) / (root / bias + group["eps"])
        decoupled = group.get("decoupled_weight_decay", isinstance(ctx.optimizer, torch.optim.AdamW))
        kept = before * (1 - float(group["lr"]) * group["weight_decay"]) if decoupled else before
        after = part.index_select(dim, fresh)
        part.index_copy_(dim, fresh, kept + c * (after - kept))

    return correct


def fresh_rate(how: str, age: int, step: int, betas: tuple[float, float]) -> float:
    """How far Adam moves a slice `age` steps after `treat_moments`, over how far it moves one that was left alone.

    For gradients that are the same in every step and alike in size in both, and eps = 0; the noise of gradients apart,
    it is the learning rate of the fresh slice as a multiple of the others'. With age k, the optimizer's step count t:

        keep, corrected: 1      zero: (1 - beta1^k) / (1 - beta1^t) * sqrt((1 - beta2^t) / (1 - beta2^k))
                                mean_v: (1 - beta1^k) / (1 - beta1^t)
    """
    if how in ("keep", "corrected"):
        return 1.0
    beta1, beta2 = betas
    first = (1 - beta1**age) / (1 - beta1**step)
    return first if how == "mean_v" else first * ((1 - beta2**step) / (1 - beta2**age)) ** 0.5


def slot_rates(params: Sequence[tuple[Tensor, int, Tensor]]) -> Callable[[], None]:
    """Call before the step; the returned function, called after it, multiplies the change of every slice by a factor.

    With factors of lr_slot / lr this is a learning rate a slice. Decoupled weight decay is scaled along, as it would be
    in a parameter group of its own; what `age_correction` corrects has to be corrected before.

    Args:
        params: (parameter, slot dimension, (slots,) factors).
    """
    work = []
    for param, dim, factors in params:
        part, mine = local(param.detach()), along(param, dim, factors)
        moving = (mine != 1).nonzero().flatten()
        if len(moving):
            work.append((part, dim, moving, mine[moving].to(part.dtype), part.index_select(dim, moving)))

    def correct() -> None:
        for part, dim, moving, factors, before in work:
            change = part.index_select(dim, moving).sub_(before)
            part.index_copy_(dim, moving, before + change * _along(factors, part, dim))

    return correct


def run_rate(group: dict[str, Any]) -> float:
    """Where the run's schedule stands: the group's learning rate as a fraction of the one it was made with."""
    base = float(group.get("initial_lr", group["lr"]))
    return float(group["lr"]) / base if base else 0.0


def restarted_rates(step: int, born: Tensor, peak: Tensor, run: float, warmup: int) -> Tensor:
    """Factors for `slot_rates` by which a slot warms up anew when it comes to life.

    With k = step - born - 1, counted from the first step in which a slot has a gradient, its learning rate is

        lr0 k / w                                 for k < w
        lr0 lambda(step) / lambda(born + 1 + w)   from then on

    where lr0 lambda is the rate of the run: full at the end of the slot's warm-up, then as the run's schedule falls.
    Under a linear schedule that is the run's own schedule begun anew over the steps that are left.

    Args:
        born: (slots,) step of birth, 0 for slots that were there from the start, which follow the run.
        peak: (slots,) lambda at the end of each slot's warm-up, 0 before; written here.
        run: lambda(step), see `run_rate`. warmup: w.
    """
    if run == 0.0:
        return torch.ones_like(peak)
    k = step - born - 1
    peak.masked_fill_((k == warmup) & (born > 0), run)
    later = torch.where(peak > 0, run / peak, torch.full_like(peak, run))
    rate = torch.where(k < warmup, k.to(peak.dtype) / max(1, warmup), later)
    rate = torch.where(k < 0, torch.ones_like(rate), rate)  # born in this very step: nothing to move
    return torch.where(born > 0, rate / run, torch.ones_like(rate))


def _along(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """`vector`, an entry for each slice of `like` along `dim`, in a shape that broadcasts over them."""
    return vector.view([-1 if i == dim else 1 for i in range(like.dim())])
