"""A stream of numbers 0 .. n - 1 without an end, in which all come once before any comes twice."""

from __future__ import annotations

import torch
from torch import Tensor


class Shuffles:
    """The stream; item i depends on (length, seed, i) alone, so that there is no state to save.

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
