"""Leading eigenvectors by a Chebyshev filter: accurate on any spectrum, seeded, and none rather than wrong ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratlas.linalg import chebyshev

SIZE, K = 160, 8


def with_eigenvalues(values: Tensor) -> tuple[Tensor, Tensor]:
    """(C, eigenvectors) in the order of `values`."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (q * values) @ q.T, q


def counted(size: int = SIZE) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64)


SPECTRA = {
    "flat": counted() ** -0.1,
    "power": counted() ** -2.0,
    "steep": 0.5 ** counted(),
    "gaussian": torch.linspace(4.0, 1e-3, SIZE, dtype=torch.float64),
    "cluster": torch.cat((torch.full((4,), 3.0), torch.full((4,), 2.999), torch.full((SIZE - 8,), 1.0))).double(),
    "tiny": 1e-30 * counted() ** -1.0,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_subspace_is_that_of_a_full_decomposition(name: str) -> None:
    matrix, q = with_eigenvalues(SPECTRA[name])
    found = chebyshev.leading_eigenvectors(matrix, K, seed=0)
    assert found is not None
    torch.testing.assert_close(found.T @ found, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(torch.linalg.svdvals(found.T @ q[:, :K]).min()) > 1 - 1e-10
    values = (found.T @ matrix @ found).diagonal()
    torch.testing.assert_close(values, SPECTRA[name][:K].flip(0), rtol=1e-9, atol=0)


def test_a_matrix_with_fewer_than_k_eigenvalues_gives_none() -> None:
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[: K - 3] = 1.0
    assert chebyshev.leading_eigenvectors(with_eigenvalues(values)[0], K, seed=0) is None


def test_the_seed_alone_decides() -> None:
    matrix, _ = with_eigenvalues(SPECTRA["flat"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = chebyshev.leading_eigenvectors(matrix, K, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, chebyshev.leading_eigenvectors(matrix, K, seed=4))
