"""The discrete cosine bases are orthonormal, and their fast transforms are products with them."""

from __future__ import annotations

import math

import pytest
import torch

from loratlas import UserError
from loratlas.linalg import dct


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize("kind", dct.SETS)
def test_every_set_is_orthonormal(kind: str, n: int) -> None:
    rows = dct.table(kind, n, 0, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(rows @ rows.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_formula() -> None:
    n = 5
    rows = dct.table("dct2", n, 0, torch.float64, torch.device("cpu"))
    for i in range(n):
        for j in range(n):
            value = math.sqrt((1 if i == 0 else 2) / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n))
            assert rows[i, j] == pytest.approx(value, abs=1e-14)
    assert torch.equal(dct.table("dct3", n, 0, torch.float64, torch.device("cpu")), rows.T)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize("kind", ["dct2", "dct3"])
def test_fast_and_plain_products_agree(kind: str, n: int) -> None:
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(0))
    for dim, matrix in ((1, x), (0, x.T)):
        plain, fast = (dct.coefficients(matrix, kind, dim, evaluation=how) for how in ("matmul", "fft"))
        torch.testing.assert_close(fast, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("kind", dct.SETS)
def test_norms_are_those_of_the_products(kind: str, n: int) -> None:
    matrix = torch.randn(7, n, generator=torch.Generator().manual_seed(0))
    products = dct.coefficients(matrix, kind, evaluation="matmul")
    for power in (1, 2):
        expected = torch.linalg.vector_norm(products, power, dim=0)
        for dim, each in ((1, matrix), (0, matrix.T)):
            found = dct.norms(each, kind, dim, power, block=3 * n)  # the last block is smaller
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_single_vectors_need_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.tensor([3, 0, 9])
    expected = dct.vectors("dct2", 12, index, 0, torch.float64)
    monkeypatch.setattr(dct, "LARGEST_TABLE", 4)
    monkeypatch.setattr(dct, "table", lambda *_: pytest.fail("a table was made"))
    assert torch.equal(dct.vectors("dct2", 12, index, 0, torch.float64), expected)
    assert dct.coefficients(torch.ones(2, 12), "dct3").shape == (2, 12)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(UserError, match="no orthonormal set 'dft'"):
        dct.table("dft", 4, 0, torch.float32, torch.device("cpu"))
