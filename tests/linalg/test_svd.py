"""Top-k SVD against dense float64 references: accuracy, signs, degenerate input, determinism, choice of method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg.svd import canonical_signs, choose_method, numerical_rank, top_svd

EXPLICIT = ("full", "gram", "lowrank")
SHAPES = [(48, 48), (96, 40), (40, 96), (300, 20), (20, 300), (1, 7), (7, 1), (9000, 6)]


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(m: int, n: int, sigma: Tensor) -> Tensor:
    """U diag(sigma) V^T with random orthonormal U (m, d), V (n, d), float64."""
    d = len(sigma)
    u, v = torch.linalg.qr(gaussian(m, d, 1)).Q, torch.linalg.qr(gaussian(n, d, 2)).Q
    return (u * sigma) @ v.T


def power_law(m: int, n: int, exponent: float) -> Tensor:
    return with_spectrum(m, n, torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -exponent)


def reference(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    u, vh = canonical_signs(u[:, :k], vh[:k])
    return u, s[:k], vh


def assert_orthonormal(u: Tensor, vh: Tensor, atol: float) -> None:
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=atol)
    torch.testing.assert_close(vh @ vh.T, eye, rtol=0, atol=atol)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_triplets_equal_the_dense_reference(m: int, n: int, method: str) -> None:
    d = min(m, n)
    weight = with_spectrum(m, n, 0.8 ** torch.arange(d, dtype=torch.float64)).float()
    for k in {1, (d + 1) // 2}:
        u, s, vh = top_svd(weight, k, method=method)
        assert (u.shape, s.shape, vh.shape) == ((m, k), (k,), (k, n))
        assert u.dtype == s.dtype == vh.dtype == torch.float32
        expected = reference(weight, k)
        for found, wanted, atol in zip((u, s, vh), expected, (2e-5, 1e-6, 2e-5), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize(("m", "n"), [(30, 30), (50, 20), (20, 50)])
def test_all_triplets_rebuild_a_float64_matrix(m: int, n: int, method: str) -> None:
    weight = gaussian(m, n)
    u, s, vh = top_svd(weight, min(m, n), method=method)
    assert u.dtype == s.dtype == vh.dtype == torch.float64
    torch.testing.assert_close((u * s) @ vh, weight, rtol=0, atol=1e-12)
    assert bool((s[:-1] >= s[1:]).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", EXPLICIT)
def test_half_precision_is_decomposed_as_float32(method: str, dtype: torch.dtype) -> None:
    weight = gaussian(24, 40).to(dtype)
    halves, floats = top_svd(weight, 5, method=method), top_svd(weight.float(), 5, method=method)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(halves, floats, strict=True))


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("rank", [0, 3])
def test_zero_sigmas_keep_the_factors_orthonormal(method: str, rank: int) -> None:
    weight = with_spectrum(60, 25, torch.tensor([5.0, 2.0, 1.0] + 22 * [0.0]).double()) * (rank > 0)
    u, s, vh = top_svd(weight.float(), 12, method=method)
    assert_orthonormal(u, vh, atol=5e-6)
    torch.testing.assert_close((u * s) @ vh, weight.float(), rtol=0, atol=1e-5)
    assert numerical_rank(s, 60, 25) == rank


def test_gram_is_as_accurate_as_promised_on_a_badly_conditioned_matrix() -> None:
    weight = with_spectrum(200, 30, torch.logspace(0, -10, 30, dtype=torch.float64))
    u, s, vh = top_svd(weight, 30, method="gram")
    assert_orthonormal(u, vh, atol=1e-12)
    assert float((s - reference(weight, 30)[1]).abs().max()) < 1e-7
    assert float(torch.linalg.matrix_norm((u * s) @ vh - weight, ord=2)) < 1e-7


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_lowrank_on_power_laws(exponent: float) -> None:
    weight = power_law(512, 384, exponent)
    _, sigma, right = reference(weight, 32)
    u, s, vh = top_svd(weight.float(), 32, method="lowrank")
    assert float(((s.double() - sigma) / sigma).abs().max()) < 1e-4
    assert float(torch.linalg.svdvals(vh.double() @ right.T).min()) > 0.999
    assert_orthonormal(u, vh, atol=5e-6)


def test_lowrank_gains_from_oversampling_and_from_power_iterations() -> None:
    weight = power_law(256, 200, 0.5)
    sigma = reference(weight, 16)[1]

    def error(**options: int) -> float:
        return float(((top_svd(weight, 16, method="lowrank", **options)[1] - sigma) / sigma).abs().max())

    assert error() < 0.01 * error(oversample=1) < 0.01 * error(oversample=1, niter=0)


def test_lowrank_neither_reads_nor_moves_the_global_generator() -> None:
    weight = gaussian(80, 60).float()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = top_svd(weight, 6, method="lowrank", seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = top_svd(weight, 6, method="lowrank", seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = top_svd(weight, 6, method="lowrank", seed=6, niter=1)
    assert not torch.equal(other[2], top_svd(weight, 6, method="lowrank", seed=5, niter=1)[2])


@pytest.mark.parametrize("method", EXPLICIT)
def test_autocast_gradients_and_strides_change_nothing(method: str) -> None:
    weight = gaussian(64, 24).float()
    plain = top_svd(weight, 4, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = top_svd(weight.T.contiguous().T.requires_grad_(), 4, method=method)
    assert not any(tensor.requires_grad for tensor in inside)
    assert all(tensor.is_contiguous() for tensor in inside)
    for a, b in zip(plain, inside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40)])
def test_the_largest_entry_of_each_right_vector_is_positive(m: int, n: int, method: str) -> None:
    weight = gaussian(m, n)
    _, _, vh = top_svd(weight, 10, method=method)
    assert torch.equal(vh.amax(dim=1), vh.abs().amax(dim=1))
    flipped = top_svd(-weight, 10, method=method)
    torch.testing.assert_close(flipped[2], vh, rtol=0, atol=1e-8)


def test_canonical_signs_ties_go_to_the_lowest_index_and_the_product_stays() -> None:
    vh = torch.tensor([[-0.6, 0.6, 0.5], [0.0, 0.7, -0.7000001], [0.1, -0.2, -0.9], [0.0, 0.0, 0.0]])
    u = torch.arange(8.0).reshape(2, 4)
    new_u, new_vh = canonical_signs(u, vh)
    assert torch.equal(new_vh, vh * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]))
    assert torch.equal(new_u, u * torch.tensor([-1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize(
    ("m", "n", "k", "chosen"),
    [
        (60, 60, 1, "full"),
        (768, 768, 64, "gram"),
        (768, 768, 65, "full"),
        (1024, 1024, 8, "gram"),
        (768, 1535, 100, "full"),
        (768, 1536, 384, "gram"),
        (1536, 768, 385, "full"),
        (384, 30522, 32, "gram"),
        (1025, 1025, 128, "lowrank"),
        (1025, 1025, 129, "full"),
        (4096, 14336, 64, "lowrank"),
        (4096, 14336, 1024, "gram"),
    ],
)
def test_choice_of_method(m: int, n: int, k: int, chosen: str) -> None:
    assert choose_method(m, n, k) == chosen
    assert choose_method(n, m, k) == chosen
    assert choose_method(m, n, k, torch.float64) == ("full" if chosen == "gram" else chosen)


@pytest.mark.parametrize(("m", "n", "k"), [(40, 30, 4), (20, 100, 4), (110, 100, 4), (1025, 1030, 2)])
def test_auto_gives_the_bits_of_the_method_it_chooses(m: int, n: int, k: int) -> None:
    weight = gaussian(m, n).float()
    explicit = top_svd(weight, k, method=choose_method(m, n, k), niter=1)
    assert all(torch.equal(a, b) for a, b in zip(top_svd(weight, k, niter=1), explicit, strict=True))


def test_numerical_rank_follows_the_dtype_of_the_values() -> None:
    sigma = torch.tensor([2.0, 1.0, 1e-5, 1e-12], dtype=torch.float64)
    assert numerical_rank(sigma, 100, 50) == 4
    assert numerical_rank(sigma.float(), 100, 50) == 2  # 100 * 1.2e-7 * 2 = 2.4e-5
    assert numerical_rank(sigma.float(), 4, 4) == 3
    assert numerical_rank(torch.zeros(3), 4, 4) == 0
    assert numerical_rank(torch.empty(0), 4, 4) == 0


@pytest.mark.parametrize(
    ("weight", "k", "options", "message"),
    [
        (torch.ones(4, 6), 5, {}, "5 singular triplets were asked of a 4x6 matrix.*at most 4"),
        (torch.ones(4, 6), 0, {}, "0 singular triplets"),
        (torch.ones(4, 6, 2), 1, {}, r"\(4, 6, 2\) of torch.float32"),
        (torch.ones(4, 6, dtype=torch.int64), 1, {}, "torch.int64"),
        (torch.full((4, 6), float("nan")), 1, {}, "4x6 matrix holds NaN"),
        (torch.ones(4, 6), 1, {"method": "exact"}, "'exact' is unknown; choose one of auto, full, gram, lowrank"),
        (torch.ones(4, 6), 1, {"niter": -1}, "niter is -1"),
        (torch.ones(4, 6), 1, {"oversample": 0}, "oversample is 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(weight: Tensor, k: int, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        top_svd(weight, k, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", EXPLICIT)
def test_cuda_agrees_with_the_cpu(method: str) -> None:
    weight = power_law(96, 64, 1.0).float()
    on_cpu, on_cuda = top_svd(weight, 8, method=method), top_svd(weight.cuda(), 8, method=method)
    assert all(tensor.is_cuda for tensor in on_cuda)
    for a, b in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-4)
