"""The k largest of numbers that lie in many tensors, exactly, without putting them side by side.

    cut = cut_at(lambda: (p.abs().flatten() for p in params), k)
    masks = [cut.take(p.abs().flatten()) for p in params]        # k of them are True, counted over all

The bits of floats that are not negative sort like integers, so two passes of a 16-bit histogram (four in float64) find
the k-th largest to its last bit, in the memory of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 24  # elements
_DIGIT = 16
_WORDS = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


@dataclass
class Cut:
    """Where the k largest end.

    Attributes:
        value: the k-th largest, a scalar tensor.
        ties: how many of the numbers equal to it belong to the k; `take` counts it down, in the order of its calls.
    """

    value: Tensor
    ties: int

    def take(self, scores: Tensor, every_tie: bool = False) -> Tensor:
        """Which of `scores`, one-dimensional, are among the k largest; `every_tie` takes all that equal the k-th."""
        value = self.value.to(scores.device)
        if every_tie:
            return scores >= value
        level = scores == value
        level &= level.cumsum(0) <= self.ties
        self.ties -= int(level.sum())
        return level | (scores > value)


def cut_at(scores: Callable[[], Iterable[Tensor]], k: int) -> Cut:
    """Find the k-th largest of all scores.

    Args:
        scores: yields one-dimensional float32 or float64 tensors of numbers >= 0, the same at every call.
        k: from 1 to the number of scores.
    """
    prefix, left, shift = 0, k, None
    while shift != 0:
        counts, dtype, width = torch.zeros(1 << _DIGIT, dtype=torch.int64), torch.float32, 32
        for chunk in _chunks(scores()):
            dtype = chunk.dtype
            word, width = _WORDS[dtype]
            bits = chunk.view(word)
            at = width - _DIGIT if shift is None else shift - _DIGIT
            if shift is not None:
                bits = bits[bits >> shift == prefix]
            counts += torch.bincount(bits >> at & (1 << _DIGIT) - 1, minlength=1 << _DIGIT).cpu()
        shift = width - _DIGIT if shift is None else shift - _DIGIT
        above = counts.flip(0).cumsum(0)  # how many have this digit or a larger one, from the largest on
        place = int(torch.searchsorted(above, left))
        left -= int(above[place - 1]) if place else 0
        prefix = prefix << _DIGIT | (1 << _DIGIT) - 1 - place
    return Cut(torch.tensor(prefix, dtype=_WORDS[dtype][0]).view(dtype), left)


def _chunks(scores: Iterable[Tensor]) -> Iterator[Tensor]:
    return (chunk for score in scores for chunk in score.split(CHUNK) if chunk.numel())
