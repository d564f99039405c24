"""Nystrom's approximation, the usable part of an SVD, and ranks by spectrum."""

from __future__ import annotations

import pytest
import torch

from loratlas import UserError
from loratlas.linalg.factorise import nystrom, row_weighted_svd, usable_svd
from loratlas.linalg.spectrum import energy, spread_ranks


def matrix(m: int, n: int, rank: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    k = rank or min(m, n)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, k), (k, n)))
    return (left @ right).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nystrom_has_the_first_rows_and_columns_and_all_of_a_matrix_of_its_rank(dtype: torch.dtype) -> None:
    w = matrix(12, 9, dtype=dtype)
    up, core, down = nystrom(w, 4)
    assert up.dtype == core.dtype == down.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    product, tolerance = up @ core @ down, 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(product[:4], w[:4].to(product), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(product[:, :4], w[:, :4].to(product), rtol=tolerance, atol=tolerance)
    assert torch.dist(product, w.to(product)) > 0.1
    low = matrix(12, 9, rank=4, dtype=torch.float64)
    up, core, down = nystrom(low, 4)
    torch.testing.assert_close(up @ core @ down, low, rtol=1e-9, atol=1e-9)
    up, core, down = nystrom(low, 6)  # the corner is singular
    torch.testing.assert_close(up @ core @ down, low, rtol=1e-6, atol=1e-6)


def test_without_inverse_nystrom_is_slices_of_its_own() -> None:
    w = matrix(6, 5)
    before = w.clone()
    up, core, down = nystrom(w, 3, pinv=False)
    assert torch.equal(up, w[:, :3])
    assert torch.equal(core, w[:3, :3])
    assert torch.equal(down, w[:3])
    for factor in (up, core, down):
        factor.zero_()
    assert torch.equal(w, before)


def test_row_weights_decide_what_a_low_rank_part_holds() -> None:
    w, rows = matrix(12, 9, dtype=torch.float64), torch.logspace(-1, 1, 12, dtype=torch.float64)
    up, s, vh = row_weighted_svd(w, rows, 4, eps=0.0)
    left = rows[:, None] * (w - (up * s) @ vh)
    torch.testing.assert_close(left.norm(), torch.linalg.svdvals(rows[:, None] * w)[4:].norm())
    plain = row_weighted_svd(w, torch.ones(12), 4, eps=0.0)
    for ours, theirs in zip(plain, usable_svd(w, 4), strict=True):
        torch.testing.assert_close(ours, theirs)
    rows[3] = 0
    assert not row_weighted_svd(w, rows, 9)[0][3].any()
    for bad in (rows[:5], -rows, rows * torch.inf):
        with pytest.raises(UserError, match="12 finite weights of at least 0"):
            row_weighted_svd(w, bad, 2)


def test_bad_corners_get_one_sentence() -> None:
    with pytest.raises(UserError, match="corner of size 6 was asked of a 8x5 matrix"):
        nystrom(matrix(8, 5), 6)
    w = matrix(8, 5)
    w[0, 3] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        nystrom(w, 2)


def test_usable_svd_stops_at_the_rank() -> None:
    w = matrix(12, 9, rank=3)
    u, s, vh = usable_svd(w, 20)
    assert (u.shape, s.shape, vh.shape) == ((12, 3), (3,), (3, 9))
    torch.testing.assert_close((u * s) @ vh, w, rtol=1e-5, atol=1e-5)
    assert usable_svd(torch.zeros(4, 5), 2)[1].tolist() == [0.0]


def test_energy() -> None:
    assert energy(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 1) == pytest.approx(4 / 6)
    assert energy(matrix(5, 4), 9) == pytest.approx(1.0)
    assert energy(torch.zeros(3, 3), 1) == 1.0


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 12, 31])
@pytest.mark.parametrize(("low", "high"), [(4, 4), (4, 6), (2, 6), (1, 9)])
def test_ranks_keep_their_sum_and_fall_with_the_energy(count: int, low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(count)
    energies = torch.rand(count, generator=generator).tolist()
    ranks = spread_ranks(energies, low, high)
    assert sum(ranks) == count * (low + high) // 2
    assert all(low <= rank <= high for rank in ranks)
    by_energy = [rank for _, rank in sorted(zip(energies, ranks, strict=True))]
    assert by_energy == sorted(ranks, reverse=True)
    sizes = [ranks.count(rank) for rank in range(low, high + 1)]
    assert max(sizes) - min(sizes) <= 1
    order = torch.randperm(count, generator=generator).tolist()
    assert spread_ranks([energies[i] for i in order], low, high) == [ranks[i] for i in order]
