"""W = P L diag(D) U for every shape and rank, finite whatever the pivots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratlas import UserError
from loratlas.linalg.ldu import ldu


def matrix(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * n), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12), (1, 6), (6, 1), (1, 1)])
def test_it_is_the_pivoted_factorisation(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = matrix(*shape, dtype)
    rows, lower, diagonal, upper = found = ldu(w)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(lower @ diagonal.diag() @ upper, w[rows], **tolerance)
    torch.testing.assert_close(found.left() @ diagonal.diag() @ upper, w, **tolerance)
    k = min(shape)
    assert torch.equal(lower[:k], lower[:k].tril())
    assert torch.equal(upper, upper.triu())
    assert torch.equal(lower.diagonal(), torch.ones(k, dtype=dtype))
    torch.testing.assert_close(upper.diagonal(), torch.ones(k, dtype=dtype))
    assert lower.abs().max() <= 1.0
    p, l_dense, u_dense = torch.linalg.lu(w)
    torch.testing.assert_close(found.left(), p @ l_dense, **tolerance)
    torch.testing.assert_close(diagonal, u_dense.diagonal(), **tolerance)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_degenerate_pivots_are_left_undivided(rank: int) -> None:
    w = (matrix(9, rank + 1)[:, :rank] @ matrix(rank + 1, 8)[:rank]).float()
    w[:, 2] = 0.0  # a column that never gets a pivot
    found = ldu(w)
    assert all(torch.isfinite(part).all() for part in found)
    assert float(found.diagonal[min(2, rank)]) == 1.0
    assert found.upper.abs().max() < 1e4
    torch.testing.assert_close(found.left() @ found.diagonal.diag() @ found.upper, w, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_factored_is_refused() -> None:
    with pytest.raises(UserError, match=r"got shape \(2, 3, 4\) of torch.float32"):
        ldu(torch.zeros(2, 3, 4))
    with pytest.raises(UserError, match="2x2 matrix holds NaN"):
        ldu(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
