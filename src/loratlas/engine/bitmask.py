"""Dropout masks of one bit an element.

Torch's dropout on CPU draws one random number an element, which takes longer than a product with a 384-wide weight, and
autograd keeps the mask as a float an element. Here a random word of 64 bits serves eight elements, and what is kept is
packed: bit j of byte i belongs to element 8 i + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 256
# multiplied with eight bytes of 0 or 1, seen as one word, it gathers them as the bits of the word's highest byte
_GATHER = 0x0102040810204080


def draw(count: int, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """A random mask for `count` elements, from the global generators.

    An element stays if its random byte is below a level, one for the whole mask. 256 (1 - dropout) is seldom an
    integer: the level is that number rounded up or down at random, so that every element stays with probability
    1 - dropout over many masks, but never less than 1 / 256.

    Returns:
        The bits, uint8 (ceil(count / 8),), 1 for an element that stays; and level / 256, the probability in this very
        mask, by which the result has to be divided.
    """
    exact = (1.0 - dropout) * _LEVELS
    level = max(1, int(exact + float(torch.rand((), dtype=torch.float64))))
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=device)
    # to=None means the whole range: the default leaves the sign bit 0
    random = words.random_(-(2**63), None).view(torch.uint8)
    stays = (random <= level - 1).view(torch.int64)  # 256 itself is no byte
    return stays.mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8), level / _LEVELS


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The mask as zeros and ones in the shape and dtype of `like`, which the caller may overwrite."""
    byte, bit = torch.arange(256, device=bits.device), torch.arange(8, device=bits.device)
    table = (byte[:, None] >> bit & 1).to(like.dtype)
    # looking bytes up takes half the time of shifting their bits apart and converting them
    ones = torch.nn.functional.embedding(bits.int(), table)
    return ones.view(-1)[: like.numel()].view(like.shape)
