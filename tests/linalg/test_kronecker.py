"""Kronecker sums: layout, best approximation, application without the matrix, and the rank rules."""

from __future__ import annotations

import pytest
import torch

from loratlas import UserError
from loratlas.linalg.kronecker import (
    Shape,
    apply_kronecker_sum,
    balanced_shape,
    kronecker_sum,
    kronecker_svd,
    rearranged,
    shape_for,
    terms_by_elbow,
    terms_by_energy,
)

SHAPES = (Shape(4, 3, 2, 5), Shape(3, 4, 5, 2), Shape(1, 6, 1, 7), Shape(6, 1, 2, 3))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_is_that_of_torch_kron(shape: Shape) -> None:
    a, b = draw(2, shape.m, shape.n), draw(2, shape.p, shape.q)
    whole = torch.kron(a[0], b[0]) + torch.kron(a[1], b[1])
    torch.testing.assert_close(kronecker_sum(a, b), whole)
    pairs = torch.einsum("ki,kj->ij", a.flatten(1), b.flatten(1))
    torch.testing.assert_close(rearranged(whole, shape), pairs)
    x = draw(3, 5, shape.n * shape.q)
    torch.testing.assert_close(apply_kronecker_sum(x, a, b), x @ whole.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_k_terms_is_the_tail_of_the_spectrum(shape: Shape) -> None:
    w = draw(shape.m * shape.p, shape.n * shape.q)
    most = min(shape.m * shape.n, shape.p * shape.q)
    u, s, v = kronecker_svd(w, shape, most)
    for k in range(most + 1):
        error = (w - kronecker_sum(s[:k, None, None] * u[:k], v[:k])).square().sum()
        torch.testing.assert_close(error, s[k:].square().sum(), rtol=1e-10, atol=1e-10)


def test_the_balanced_split_has_the_fewest_entries() -> None:
    assert balanced_shape(4096, 4096) == Shape(64, 64, 64, 64)
    m, p, n, q = balanced_shape(1536, 384)
    assert (m * p, n * q) == (1536, 384)
    assert m * n + p * q == min(a * c + (1536 // a) * (384 // c) for a in range(1, 1537) if 1536 % a == 0
                                for c in range(1, 385) if 384 % c == 0)  # fmt: skip
    assert balanced_shape(7, 11) in (Shape(1, 7, 1, 11), Shape(7, 1, 1, 11), Shape(1, 7, 11, 1), Shape(7, 1, 11, 1))


def test_a_shape_that_does_not_divide_is_refused() -> None:
    assert shape_for(12, 10, 4, 2) == Shape(4, 3, 2, 5)
    with pytest.raises(UserError, match="12 x 10 weight has no Kronecker factor of shape 5 x 2"):
        shape_for(12, 10, 5, 2)


def test_rank_rules() -> None:
    s = torch.tensor([4.0, 3.0, 1.0, 0.5])
    total = float(s.square().sum())
    assert [terms_by_energy(s, total, tau) for tau in (0.1, 0.6, 0.95, 1.0)] == [1, 1, 2, 4]
    assert terms_by_energy(s, 10 * total, 0.9) == 4
    assert terms_by_elbow(torch.tensor([10.0, 9.0, 0.5, 0.4, 0.3])) == 3
    assert terms_by_elbow(torch.tensor([1.0, 1.0, 1.0])) >= 1
    assert terms_by_elbow(torch.tensor([2.0])) == 1
