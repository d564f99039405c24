"""Which modules get more rank, under a budget of ranks for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALLOCATIONS = ("exact", "official")


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, best first; ties go to the earlier one."""
    return scores.argsort(descending=True, stable=True)[:k]


def growth(
    scores: Tensor, ranks: Sequence[int], capacity: Sequence[int], add: int, chosen: int, budget: int, rule: str
) -> list[int]:
    """How many ranks each module gains in a round of growth.

    rule "exact": the `chosen` best modules that have room gain `add`, the last one less where that would pass the
    module's capacity or the budget. "official": all modules at or above the `chosen`-th largest score gain `add`, ties
    and budget notwithstanding, as the official codes have it; a module's capacity holds.

    Args:
        scores: (modules,). ranks, capacity: of each module now and at most. budget: ranks left for all modules.
    """
    room = [most - now for now, most in zip(ranks, capacity, strict=True)]
    gains = [0] * len(room)
    if rule == "official":
        threshold = scores[largest(scores, chosen)[-1]]
        for i in (scores >= threshold).nonzero().flatten().tolist():
            gains[i] = min(add, room[i])
        return gains
    open_modules = torch.tensor([free > 0 for free in room], device=scores.device)
    order = largest(scores.masked_fill(~open_modules, -torch.inf), min(chosen, int(open_modules.sum())))
    for i in order.tolist():
        gains[i] = min(add, room[i], budget)
        budget -= gains[i]
    return gains
