"""Which modules get more rank, and which pairs start again, under a budget for all of them."""

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


def relative_lowest(scores: Sequence[Tensor], capacity: Sequence[int], count: int) -> Tensor:
    """The `count` pairs of all modules whose scores are lowest relative to the mean of their module's.

    A module gives at most its capacity; ties go to the earlier module and pair. Nothing is read from the device.

    Args:
        scores: (r_i,) of each module, none negative.

    Returns:
        (sum of r_i,) bool: which pairs, of one module after the other.
    """
    relative = []
    for own, room in zip(scores, capacity, strict=True):
        shares = own / own.mean().clamp_min(torch.finfo(own.dtype).tiny)
        closed = own.argsort(stable=True)[room:]
        relative.append(shares.index_fill(0, closed, torch.inf))
    every = torch.cat(relative)
    most = sum(min(len(own), room) for own, room in zip(scores, capacity, strict=True))
    chosen = every.argsort(stable=True)[: min(count, most)]
    return torch.zeros(len(every), dtype=torch.bool, device=every.device).index_fill_(0, chosen, True)
