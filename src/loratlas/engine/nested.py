"""Adapters of nested ranks: the first b pairs of every layer are an adapter of rank b, whatever b is.

A method says so by `Method.nested`, the name of its buffer () that holds the b of evaluation, merging and exports.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.errors import UserError


def nested_rank(model: nn.Module, adapter: str = "default") -> int | None:
    """The largest rank that `use_rank` can choose; None where the adapter's ranks are not nested."""
    return max((t.r for t in _views(model, adapter)), default=None)


def use_rank(model: nn.Module, rank: int, adapter: str = "default") -> None:
    """Use the first `rank` pairs of every layer, all of them in layers that have fewer.

    Raises:
        UserError: the adapter is merged, at another rank.
    """
    for t in _views(model, adapter):
        if adapter in t.layer.merged_adapters:
            raise UserError(f"adapter {adapter!r} is merged at its rank: call unmerge_adapter() first.")
        getattr(t, t.layer.method.nested).fill_(min(rank, t.r))


@contextmanager
def at_most(model: nn.Module, rank: int | None, adapter: str = "default") -> Iterator[None]:
    """A nested adapter is of rank `rank` inside the block if it is of a larger one; nothing happens to others.

    Raises:
        UserError: as `use_rank`.
    """
    used = [getattr(t, t.layer.method.nested) for t in _views(model, adapter)]
    before = [int(each) for each in used]
    if rank is None or rank >= max(before, default=0):
        yield
        return
    use_rank(model, rank, adapter)
    try:
        yield
    finally:
        for each, value in zip(used, before, strict=True):
            each.fill_(value)


def _views(model: nn.Module, adapter: str) -> list[View]:
    return [layer.view(adapter) for _, layer in atlas_layers(model, adapter) if layer.method.nested]
