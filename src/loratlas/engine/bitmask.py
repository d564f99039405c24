"""Dropout masks of one bit an element.

Torch's dropout on CPU draws one random number an element, which takes longer than a product with a 384-wide weight, and
autograd keeps the mask as a float an element. Here eight random bits make an element's bit, 64 of them at a time, and
are kept as they come: bit j of byte i belongs to element 8 i + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIGITS = 8
_LEVELS = 1 << _DIGITS


def draw(count: int, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """A random mask for `count` elements, from the global generators.

    An element stays with probability level / 256. 256 (1 - dropout) is seldom an integer: the level of a mask is that
    number rounded up or down at random, so that every element stays with probability 1 - dropout over many masks, but
    never less than 1 / 256.

    Returns:
        The bits, uint8, at least count / 8 of them, 1 for an element that stays; and level / 256, the probability in
        this very mask, by which the result has to be divided.
    """
    exact = (1.0 - dropout) * _LEVELS
    level = max(1, int(exact + float(torch.rand((), dtype=torch.float64))))
    words = (count + 63) // 64
    stays = torch.full((words,), -1 if level == _LEVELS else 0, dtype=torch.int64, device=device)
    if level < _LEVELS:
        # to=None means the whole range: the default leaves the sign bit 0
        random = torch.empty(_DIGITS, words, dtype=torch.int64, device=device).random_(-(2**63), None)
        # from the level's last binary digit to its first: a fair bit halves the probability p so far, by "and", or
        # makes it (1 + p) / 2, by "or"
        for digit, fair in enumerate(random):
            stays = stays.bitwise_or_(fair) if level >> digit & 1 else stays.bitwise_and_(fair)
    return stays.view(torch.uint8), level / _LEVELS


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The mask as zeros and ones in the shape and dtype of `like`, which the caller may overwrite."""
    byte, bit = torch.arange(256, device=bits.device), torch.arange(8, device=bits.device)
    table = (byte[:, None] >> bit & 1).to(like.dtype)
    # looking bytes up takes half the time of shifting their bits apart and converting them
    ones = torch.nn.functional.embedding(bits[: (like.numel() + 7) // 8].int(), table)
    return ones.view(-1)[: like.numel()].view(like.shape)
