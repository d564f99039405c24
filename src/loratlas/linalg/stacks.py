"""Small dense problems of many layers at once: items of equal shapes are stacked, and each stack is one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loratlas.linalg.svd import float64_device, result_dtype

# numbers of one stack, so that the float64 copies of a large model's factors are never all there at one time
_LIMIT = 2**22


@torch.no_grad()
def in_stacks(
    function: Callable[..., tuple[Tensor, ...]], items: Sequence[tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """[function(*item) for item in items], with `function` called on stacks (n, ...) of equal items, in float64.

    Args:
        function: takes one stack for every tensor of an item and returns stacks of n results each.
        items: tuples of tensors; those of one item lie on one device.

    Returns:
        The results in the order of `items`, on the item's device, float64 for float64 items and float32 for others.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, item in enumerate(items):
        key = (item[0].device, result_dtype(*item), *(t.shape for t in item))
        groups.setdefault(key, []).append(i)
    results: list[tuple[Tensor, ...]] = [()] * len(items)
    for (device, dtype, *_), members in groups.items():
        count = max(1, _LIMIT // sum(t.numel() for t in items[members[0]]))
        for begin in range(0, len(members), count):
            part = members[begin : begin + count]
            stacks = (torch.stack(column) for column in zip(*(items[i] for i in part), strict=True))
            with torch.autocast(device.type, enabled=False):
                made = function(*(stack.to(float64_device(device), torch.float64) for stack in stacks))
            rows = (stack.to(device=device, dtype=dtype).unbind() for stack in made)
            for i, row in zip(part, zip(*rows, strict=True), strict=True):
                results[i] = row
    return results


def row_squares(up: Tensor, down: Tensor) -> Tensor:
    """Squared norms of the rows of up @ down, (..., m), by an r x r Gram matrix; up (..., m, r), down (..., r, n)."""
    return ((up @ (down @ down.mT)) * up).sum(-1).clamp_min(0.0)
