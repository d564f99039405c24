"""The factors' move nearest to a gradient, the solves underneath, and stacks of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratlas.linalg import stacks
from loratlas.linalg.stacks import in_stacks, row_squares
from loratlas.linalg.sylvester import Spectrum, solve_sylvester
from loratlas.linalg.tangent import X_MODES, tangent_factors

S = torch.tensor([2.0, 0.5, 1.3], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(r: int = 3, n_in: int = 8, n_out: int = 10) -> tuple[Tensor, ...]:
    """(A, B, G, gA, gB) of three pairs with scaling S."""
    a, b, g = draw(3, r, n_in), draw(3, n_out, r, seed=1), draw(3, n_out, n_in, seed=2)
    s = S[:, None, None]
    return a, b, g, s * b.mT @ g, s * g @ a.mT


def product(a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor) -> Tensor:
    return S[:, None, None] * (b @ d_a + d_b @ a)


def projected(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    p_b, p_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    return p_b @ g + g @ p_a - p_b @ g @ p_a


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("r", [3, 9])  # 9: A has more rows than columns and none of the Gram matrices is regular
def test_the_move_is_the_projection_of_the_gradient(x_mode: str, r: int) -> None:
    a, b, g, grad_a, grad_b = problem(r)
    b[0] = b[0, :, :1] * draw(1, r, seed=3)  # rank one
    grad_a = S[:, None, None] * b.mT @ g
    moved = product(a, b, *tangent_factors(a, b, grad_a, grad_b, S, x_mode=x_mode))
    torch.testing.assert_close(moved, projected(a, b, g), rtol=1e-9, atol=1e-9)


def test_no_move_of_the_factors_is_nearer() -> None:
    a, b, g, grad_a, grad_b = problem()
    moved = product(a, b, *tangent_factors(a, b, grad_a, grad_b, S))
    rest = g - moved
    assert float((b.mT @ rest).abs().max()) < 1e-10
    assert float((rest @ a.mT).abs().max()) < 1e-10
    plain = product(a, b, grad_a, grad_b)
    best = (plain * g).sum((1, 2)) / plain.square().sum((1, 2))  # the scale that suits LoRA's own move best
    assert bool((rest.norm(dim=(1, 2)) < 0.99 * (g - best[:, None, None] * plain).norm(dim=(1, 2))).all())
    assert bool(((moved * g).sum((1, 2)) > 0).all())


def test_sylvester_stays_nearest_to_the_gradients_of_the_factors() -> None:
    a, b, _, grad_a, grad_b = problem()
    d_a, d_b = tangent_factors(a, b, grad_a, grad_b, S)

    def distance(x: Tensor) -> Tensor:
        return ((d_a + x @ a - grad_a).square().sum((1, 2)) + (d_b - b @ x - grad_b).square().sum((1, 2))).sum()

    x = torch.zeros(3, 3, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(x), x)
    assert float(slope.abs().max()) < 1e-9
    assert all(distance(x) < distance(x + 1e-2 * draw(3, 3, 3, seed=seed)) for seed in range(5))


def test_symmetry_lets_both_factors_make_half_of_what_both_can() -> None:
    a, b, g, grad_a, grad_b = problem()
    d_a, d_b = tangent_factors(a, b, grad_a, grad_b, S, x_mode="symmetry")
    p_b, p_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    torch.testing.assert_close(product(a, b, d_a, torch.zeros_like(d_b)), p_b @ g - 0.5 * p_b @ g @ p_a)
    torch.testing.assert_close(product(a, b, torch.zeros_like(d_a), d_b), g @ p_a - 0.5 * p_b @ g @ p_a)


@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_the_first_steps_from_a_zero_factor(size: float) -> None:
    a, b, g, _, grad_b = problem()
    b = size * b
    d_a, d_b = tangent_factors(a, b, S[:, None, None] * b.mT @ g, grad_b, S, jitter=1e-8)
    expected = projected(a, b, g)  # however small B is
    torch.testing.assert_close(product(a, b, d_a, d_b), expected, rtol=1e-6, atol=1e-6)
    if size == 0.0:
        assert not d_a.any()
        torch.testing.assert_close(d_b, grad_b @ torch.linalg.inv(a @ a.mT) / S[:, None, None] ** 2)


def test_rescaled_factors_move_the_product_alike() -> None:
    a, b, _, grad_a, grad_b = problem()
    moved = product(a, b, *tangent_factors(a, b, grad_a, grad_b, S, jitter=1e-4))
    c = 30.0
    other = product(c * a, b / c, *tangent_factors(c * a, b / c, grad_a / c, grad_b * c, S, jitter=1e-4))
    torch.testing.assert_close(other, moved)
    assert float((product(c * a, b / c, grad_a / c, grad_b * c) - product(a, b, grad_a, grad_b)).norm()) > 1.0


def test_sylvester_equals_the_general_solver() -> None:
    half, other, c = draw(3, 4, 6), draw(3, 5, 7, seed=1), draw(3, 4, 5, seed=2)
    left, right = half @ half.mT, other @ other.mT
    x = solve_sylvester(Spectrum.of(left), Spectrum.of(right), c)
    torch.testing.assert_close(left @ x + x @ right, c, rtol=1e-10, atol=1e-10)
    eye4, eye5 = (torch.eye(k, dtype=torch.float64) for k in (4, 5))
    for i in range(3):
        general = torch.linalg.solve(torch.kron(left[i], eye5) + torch.kron(eye4, right[i]), c[i].flatten())
        torch.testing.assert_close(x[i].flatten(), general)


def test_stacks_give_what_single_calls_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_LIMIT", 60)  # at most two items of the smaller kind
    sizes = [(2, 6, 7), (3, 5, 9), (2, 6, 7), (2, 6, 7), (3, 5, 9)]
    items = [(draw(m, r, seed=i).float(), draw(r, n, seed=i + 9).float()) for i, (r, n, m) in enumerate(sizes)]
    calls = []

    def squares(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(up))
        assert up.dtype == torch.float64
        return row_squares(up, down), up.sum((1, 2))

    found = in_stacks(squares, items)
    assert sorted(calls) == [1, 1, 1, 2]
    for (up, down), (rows, total) in zip(items, found, strict=True):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, (up @ down).square().sum(1))
        torch.testing.assert_close(total, up.sum())
