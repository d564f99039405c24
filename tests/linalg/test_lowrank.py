"""Algebra on factor pairs against the dense float64 products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg.lowrank import (
    Compressed,
    compress,
    concatenate,
    inner,
    norm,
    pad,
    relative_error,
    singular_values,
)

# (m, n, r): tall, wide, square, rank one, r beyond both sides, vectors
SHAPES = [(90, 12, 5), (12, 90, 5), (40, 40, 8), (30, 20, 1), (6, 9, 20), (1, 8, 3), (8, 1, 3)]


def pair(m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, r, generator=generator, dtype=torch.float64)
    return up.to(dtype), torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype)


def dense(up: Tensor, down: Tensor) -> Tensor:
    return up.double() @ down.double()


def frobenius(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_inner_norm_and_singular_values_equal_the_dense_ones(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    p, q = pair(m, n, r, 1, dtype), pair(m, n, r + 2, 2, dtype)
    assert inner(p, q) == pytest.approx(float((dense(*p) * dense(*q)).sum()), rel=1e-11, abs=1e-11)
    assert norm(p) == pytest.approx(frobenius(dense(*p)), rel=1e-12)
    found, wanted = singular_values(p), torch.linalg.svdvals(dense(*p))[: min(m, n, r)]
    assert found.shape == (min(m, n, r),)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-6, atol=1e-12)


def test_concatenate_is_the_sum_and_keeps_gradients() -> None:
    pairs = [pair(7, 9, 2, 1), pair(7, 9, 4, 2), pair(7, 9, 1, 3)]
    pairs[0][0].requires_grad_()
    up, down = concatenate(pairs)
    assert (up.shape, down.shape) == ((7, 7), (7, 9))
    torch.testing.assert_close(up @ down, sum(dense(*p) for p in pairs), rtol=0, atol=1e-13)
    (up @ down).sum().backward()
    torch.testing.assert_close(pairs[0][0].grad, pairs[0][1].sum(dim=1).expand(7, 2), rtol=0, atol=1e-13)


def test_a_cancelling_difference_keeps_its_norm() -> None:
    up, down = pair(60, 50, 4, 1)
    moved = up + 1e-10 * pair(60, 50, 4, 2)[0]
    truth = frobenius((moved - up) @ down)
    p = concatenate([(moved, down), (-up, down)])
    assert norm(p) == pytest.approx(truth, rel=1e-4)
    assert relative_error((up, down), (moved, down)) == pytest.approx(truth / frobenius(up @ down), rel=1e-4)
    # the square root of the inner product, which norm avoids, has lost every digit here
    assert math.sqrt(abs(inner(p, p))) != pytest.approx(truth, rel=0.5)


def test_compress_of_a_float32_difference_finds_the_small_change() -> None:
    up, down = pair(80, 70, 3, 1, torch.float32)
    moved = up + 1e-4 * pair(80, 70, 3, 2, torch.float32)[0]
    truth = (moved.double() - up.double()) @ down.double()
    packed = compress(*concatenate([(moved, down), (-up, down)]))
    assert (packed.rank, packed.error) == (3, 0.0)
    assert frobenius(dense(packed.up, packed.down) - truth) < 1e-6 * frobenius(truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_compress_without_bounds_is_exact(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    p = pair(m, n, r, 3, dtype)
    packed = compress(*p)
    assert packed.rank == min(m, n, r) == packed.up.shape[1] == packed.down.shape[0]
    assert packed.error == 0.0
    assert packed.up.dtype == packed.down.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = 1e-13 if dtype == torch.float64 else 5e-7
    assert frobenius(dense(packed.up, packed.down) - dense(*p)) < limit * frobenius(dense(*p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize(("m", "n"), [(90, 40), (40, 90), (50, 50)])
def test_truncation_is_optimal_and_reports_the_dense_error(m: int, n: int, rank: int, dtype: torch.dtype) -> None:
    p = pair(m, n, 7, 4, dtype)
    packed = compress(*p, rank=rank)
    full = dense(*p)
    sigma = torch.linalg.svdvals(full)
    best = float(sigma[rank:].norm() / sigma.norm())
    assert packed.rank == rank
    assert packed.error == pytest.approx(best, abs=1e-10)
    assert frobenius(full - dense(packed.up, packed.down)) / frobenius(full) == pytest.approx(packed.error, abs=1e-6)
    assert relative_error(p, (packed.up, packed.down)) == pytest.approx(packed.error, abs=1e-6)


def test_factors_are_balanced_and_signed() -> None:
    up, down = pair(30, 45, 6, 5)
    packed = compress(up * 1e3, down, rank=4)
    sigma = torch.linalg.svdvals(dense(up * 1e3, down))[:4]
    torch.testing.assert_close(packed.up.T @ packed.up, torch.diag(sigma), rtol=1e-11, atol=1e-8)
    torch.testing.assert_close(packed.down @ packed.down.T, torch.diag(sigma), rtol=1e-11, atol=1e-8)
    assert torch.equal(packed.down.amax(dim=1), packed.down.abs().amax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_redundant_ranks_are_dropped(dtype: torch.dtype) -> None:
    up, down = pair(64, 48, 5, 6, dtype)
    packed = compress(torch.cat((up, -up, up), dim=1), torch.cat((down, 0.5 * down, down)))
    assert (packed.rank, packed.error) == (5, 0.0)
    torch.testing.assert_close(dense(packed.up, packed.down), 1.5 * dense(up, down), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "cancelled", "empty"])
def test_a_zero_product_has_rank_zero(kind: str) -> None:
    up, down = pair(20, 15, 3, 7)
    p = {
        "zeros": (torch.zeros_like(up), down),
        "cancelled": concatenate([(up, down), (-up, down)]),
        "empty": (up[:, :0], down[:0]),
    }[kind]
    packed = compress(*p, rank=2)
    assert (packed.rank, packed.error) == (0, 0.0)
    assert (packed.up.shape, packed.down.shape) == ((20, 0), (0, 15))
    assert norm(p) < 1e-13
    assert norm(pad(packed.up, packed.down, 4)) == 0.0


@pytest.mark.parametrize("tol", [0.0, 0.01, 0.1, 0.5])
def test_tolerance_gives_the_smallest_rank_that_meets_it(tol: float) -> None:
    up, down = pair(50, 60, 10, 8)
    up = up * 2.0 ** -torch.arange(10)
    sigma = torch.linalg.svdvals(dense(up, down))[:10]
    losses = [float(sigma[i:].norm() / sigma.norm()) for i in range(11)]
    wanted = next(i for i, loss in enumerate(losses) if loss <= tol)
    packed = compress(up, down, tol=tol)
    assert packed.rank == wanted
    assert packed.error == pytest.approx(losses[wanted], abs=1e-12)
    assert compress(up, down, rank=1, tol=tol).rank == 1


def test_compress_is_deterministic_detached_and_blind_to_autocast() -> None:
    up, down = pair(30, 20, 6, 9, torch.float32)
    up.requires_grad_()
    state = torch.get_rng_state()
    first = compress(up, down, rank=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = compress(up, down, rank=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
    assert not first.up.requires_grad
    assert isinstance(first, Compressed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pad_keeps_the_product_bit_for_bit(dtype: torch.dtype) -> None:
    up, down = pair(9, 7, 3, 10, dtype)
    wide_up, wide_down = pad(up, down, 8)
    assert (wide_up.shape, wide_down.shape, wide_up.dtype) == ((9, 8), (8, 7), dtype)
    assert torch.equal(wide_up[:, :3], up)
    assert torch.equal(wide_down[:3], down)
    assert float(wide_up[:, 3:].abs().sum() + wide_down[3:].abs().sum()) == 0.0


def test_relative_error_of_equal_different_and_zero_products() -> None:
    p, q = pair(20, 30, 4, 11), pair(20, 30, 2, 12)
    rotation = torch.linalg.qr(pair(4, 4, 4, 13)[0]).Q
    assert relative_error(p, (p[0] @ rotation, rotation.T @ p[1])) < 1e-14
    wanted = frobenius(dense(*p) - dense(*q)) / frobenius(dense(*p))
    assert relative_error(p, q) == pytest.approx(wanted, rel=1e-12)
    zero = (torch.zeros(20, 1), torch.zeros(1, 30))
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, p) == math.inf
    assert relative_error(p, zero) == pytest.approx(1.0, rel=1e-12)


UP, DOWN = torch.ones(4, 2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: concatenate([]), "no factor pair"),
        (lambda: concatenate([(UP, DOWN), (UP, torch.ones(2, 5))]), "these are 4x3, 4x5"),
        (lambda: inner((UP, DOWN), (UP, torch.ones(2, 5))), "4x3 and 4x5"),
        (lambda: relative_error((UP, DOWN), (UP, torch.ones(2, 5))), "4x3, 4x5"),
        (lambda: norm((UP, torch.ones(3, 3))), r"\(4, 2\) and \(3, 3\)"),
        (lambda: compress(UP.long(), DOWN), "torch.int64"),
        (lambda: compress(UP * math.inf, DOWN), r"\(4, 2\) @ \(2, 3\) holds NaN or infinite"),
        (lambda: compress(UP, DOWN, rank=0), "to rank 0"),
        (lambda: compress(UP, DOWN, tol=1.5), r"1.5; it is a relative error"),
        (lambda: compress(UP, DOWN, tol=math.nan), "nan"),
        (lambda: pad(UP, DOWN, 1), "rank 2 cannot be padded to rank 1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
