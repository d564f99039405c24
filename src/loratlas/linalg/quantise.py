"""Rows of a matrix in 4 or 8 bits: 2^b - 1 equal steps between a row's least and greatest entry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantised(NamedTuple):
    """codes: uint8, (m, n), for 4 bits (m, ceil(n / 2)) with the earlier entry in the low half; low, step: (m, 1)."""

    codes: Tensor
    low: Tensor
    step: Tensor


def quantise_rows(x: Tensor, bits: int) -> Quantised:
    """Round every entry of x (m, n) to the nearest of the 2^bits levels of its row; a constant row stays exact."""
    low, high = x.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((x - low) / torch.where(step > 0, step, 1)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return Quantised(codes, low, step)


def dequantise_rows(q: Quantised, bits: int, n: int) -> Tensor:
    """The (m, n) matrix that the codes stand for; off by half a step at most."""
    codes = q.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)[:, :n]
    return torch.addcmul(q.low, codes.to(q.low.dtype), q.step)
