"""Block and shard algebra against its definition, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg import blocks

R, ROWS, COLUMNS = 2, 3, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [True, False])
def test_affine_maps_act_block_by_block(rows: bool) -> None:
    w, count = draw(R * ROWS, R * COLUMNS), ROWS if rows else COLUMNS
    factor, shift = draw(count, R, R, seed=1), draw(count, R, R, seed=2)
    ours = (blocks.affine_rows if rows else blocks.affine_columns)(w, factor, shift)
    for a in range(ROWS):
        for b in range(COLUMNS):
            i, j, k = slice(R * a, R * a + R), slice(R * b, R * b + R), a if rows else b
            torch.testing.assert_close(ours[i, j], w[i, j] @ factor[k] + shift[k])


def test_factors_of_columns_can_act_on_the_input() -> None:
    w, x, factor = draw(6, 8), draw(2, 5, 8, seed=1), draw(COLUMNS, R, R, seed=2)
    through_weight = x @ blocks.affine_columns(w, factor, torch.zeros_like(factor)).T
    torch.testing.assert_close(blocks.times_shards(x, factor) @ w.T, through_weight)


def test_the_tiled_identity_sums_shards_and_the_last_may_be_narrow() -> None:
    x = draw(3, 7)
    summed = x[:, :3] + x[:, 3:6] + torch.nn.functional.pad(x[:, 6:], (0, 2))
    torch.testing.assert_close(x @ blocks.tiled_identity(3, 7, x).T, summed)


def test_a_size_that_does_not_divide_names_the_nearest() -> None:
    assert blocks.nearest_divisor(5, 12) == 6
    assert blocks.nearest_divisor(5, 16, 12) == 4
    assert blocks.nearest_divisor(64, 7) == 7
    blocks.require_blocks(4, 16, 12)
    with pytest.raises(UserError, match=r"16 x 12 weight .* 5 x 5 blocks: take r=4 "):
        blocks.require_blocks(5, 16, 12)
