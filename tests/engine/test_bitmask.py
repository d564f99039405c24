"""Packed dropout masks: their frequencies, their size, and what is read back."""

from __future__ import annotations

import pytest
import torch

from loratlas.engine import bitmask

CPU = torch.device("cpu")


@pytest.mark.parametrize("dropout", [0.003, 0.1, 0.5, 0.99])
def test_every_element_stays_with_the_probability_asked_for(dropout: float) -> None:
    torch.manual_seed(0)
    draws, like = 4000, torch.empty(64)
    masks = torch.stack([bitmask.unpack(bitmask.draw(64, dropout, CPU)[0], like) for _ in range(draws)])
    stays = 1 - dropout
    # the level is common to a mask, hence more spread between masks than (stays dropout)
    sigma = (stays * dropout + 0.25 / 256**2) ** 0.5
    assert bool(((masks.mean(0) - stays).abs() < 5 * sigma / draws**0.5).all())


def test_a_mask_has_the_probability_that_it_names() -> None:
    torch.manual_seed(0)
    for _ in range(4):
        bits, stays = bitmask.draw(200_000, 0.1, CPU)
        share = float(bitmask.unpack(bits, torch.empty(200_000)).mean())
        assert abs(share - stays) < 5 * (stays * (1 - stays) / 200_000) ** 0.5


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    count = 160_000
    mask = bitmask.unpack(bitmask.draw(count, 0.5, CPU)[0], torch.empty(count)) - 0.5
    for distance in (1, 2, 3, 8, 63, 64, 65, count // 8):
        assert abs(float((mask[distance:] * mask[:-distance]).mean())) < 0.25 * 5 / count**0.5


@pytest.mark.parametrize("count", [1, 7, 8, 13, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_bit_an_element_in_order(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    bits, _ = bitmask.draw(count, 0.4, CPU)
    assert bits.dtype == torch.uint8
    assert bits.numel() == (count + 63) // 64 * 8
    expected = [int(bits[i // 8]) >> i % 8 & 1 for i in range(count)]
    like = torch.empty(count, dtype=dtype)
    assert torch.equal(bitmask.unpack(bits, like), torch.tensor(expected, dtype=dtype))
