"""AdamW's step on gradients that are not the parameters' own, with torch's arithmetic and torch's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_(state: Any, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """One step of `torch.optim.AdamW`, bit for bit, of `params` along `grads`; both in place and of one dtype each.

    Args:
        state: the optimizer's `state`; "step", "exp_avg" and "exp_avg_sq" of a parameter are made at its first step.
        group: has lr, betas, eps and weight_decay (decoupled).
    """
    for p in params:
        if "exp_avg" not in state[p]:
            moments = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in _MOMENTS}
            state[p].update(step=torch.zeros(()), **moments)
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        list(grads),
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


_MOMENTS = ("exp_avg", "exp_avg_sq")
