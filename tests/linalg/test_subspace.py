"""One side's singular directions are those of the whole SVD."""

from __future__ import annotations

import pytest
import torch

from loratlas.linalg.subspace import leading_directions


@pytest.mark.parametrize("method", ["auto", "full", "gram"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)])
def test_directions_are_lapacks(shape: tuple[int, int], dim: int, method: str) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = (u.T if dim == 0 else vh)[:3]
    found = leading_directions(matrix, 3, dim, method)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    cosines = (found.double() * expected).sum(1)
    torch.testing.assert_close(cosines.abs(), torch.ones_like(cosines), rtol=0, atol=1e-6)  # in the same order
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_a_zero_matrix_has_some_basis() -> None:
    found = leading_directions(torch.zeros(4, 6), 2, 0)
    torch.testing.assert_close(found @ found.T, torch.eye(2), rtol=0, atol=1e-6)
