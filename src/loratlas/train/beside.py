"""A set of rows beside the training rows: every batch carries as many of the one as of the other.

Both lie in one dataset, the training rows first, with a column that says which rows are of the set. The order goes from
one to the other in turn, so batches of twice the size hold half of each, on every rank of a distributed run as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from loratlas.linalg.shuffles import Shuffles


def joined(rows: Dataset, others: Dataset, name: str) -> Dataset:
    """Both sets with the boolean column `name`, true for `others`."""
    parts = [part.add_column(name, [part is others] * len(part)) for part in (rows, others)]
    return concatenate_datasets(parts)


class InTurn(Sampler[int]):
    """The numbers of `own`, each followed by one of n .. n + others - 1 where n is the number of training rows.

    `own` decides the order of the training rows as if the others were not there. These come shuffled, all of them once
    before any comes twice, over the epochs. A pure function of seed and epoch.
    """

    def __init__(self, own: Sampler[int], rows: int, others: int, seed: int) -> None:
        self.own, self.rows, self.epoch = own, rows, 0
        self._others = Shuffles(others, seed)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        inner: Any = self.own
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)

    def __len__(self) -> int:
        return 2 * len(self.own)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * (len(self) // 2)
        for place, row in enumerate(self.own, start):
            yield row
            yield self.rows + self._others[place]
