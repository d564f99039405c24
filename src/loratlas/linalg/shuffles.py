"""Rows in random order: a stream without an end, and batches of like lengths."""

from __future__ import annotations

import torch
from torch import Tensor

_SPAN = 50  # batches that are sorted together: enough for like lengths, few enough for other company in every epoch


class Shuffles:
    """A stream of numbers 0 .. n - 1, in which all come once before any comes twice.

    Item i depends on (length, seed, i) alone, so that there is no state to save.

    Args:
        length: n, at least 1.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._made: dict[int, Tensor] = {}  # a cache of the newest shuffles, no state

    def __getitem__(self, index: int) -> int:
        shuffle, place = divmod(index, self.length)
        if shuffle not in self._made:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + shuffle) % 2**63)
            self._made = {
                **dict(list(self._made.items())[-1:]),
                shuffle: torch.randperm(self.length, generator=generator),
            }
        return int(self._made[shuffle][place])


def by_length(rows: Tensor, lengths: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """`rows` in batches of `size` rows of like lengths, the batches in random order; one that is not full comes last.

    The rows are permuted, sorted by length 50 batches at a time, and the batches of each 50 are permuted.

    Args:
        rows: (m,) numbers of rows.
        lengths: (n,) of all rows.
    """
    rows, full, rest = rows[torch.randperm(len(rows), generator=generator)], list[Tensor](), list[Tensor]()
    for span in rows.split(_SPAN * size):
        batches = span[lengths[span].argsort(stable=True)].split(size)
        for at in torch.randperm(len(batches), generator=generator).tolist():
            (full if len(batches[at]) == size else rest).append(batches[at])
    return full + rest
