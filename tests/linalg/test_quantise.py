"""Rows in 4 or 8 bits are off by half a step at most, whatever their length and range."""

from __future__ import annotations

import pytest
import torch

from loratlas.linalg.quantise import dequantise_rows, quantise_rows


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_level_is_used(bits: int, n: int) -> None:
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    packed = quantise_rows(x, bits)
    assert packed.codes.shape == (5, n if bits == 8 else (n + 1) // 2)
    gap = (dequantise_rows(packed, bits, n) - x).abs() / packed.step
    assert gap.max() <= 0.5 + 1e-3
    span = x.amax(1) - x.amin(1)
    torch.testing.assert_close(packed.step[:, 0] * (2**bits - 1), span)


def test_constant_rows_are_exact() -> None:
    x = torch.tensor([[2.5, 2.5, 2.5], [0.0, 0.0, 0.0]])
    for bits in (4, 8):
        assert torch.equal(dequantise_rows(quantise_rows(x, bits), bits, 3), x)
