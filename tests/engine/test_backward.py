"""What a method may ask of a branch's backward pass: a row scale of the factors' gradients, a look at (g, x)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Toy, inputs

from loratlas.engine.factors import Factors, low_rank_branch
from loratlas.engine.fused import fused_linear
from loratlas.engine.ops import kind_of, op_for

SCALE = torch.linspace(0.2, 3.0, 16, dtype=torch.float64)


def layer(kind: str) -> tuple[nn.Module, Any, Tensor]:
    base = Toy(kind, torch.float64).first.requires_grad_(False)
    return base, op_for(base, str(kind_of(base, {}))), inputs(kind, torch.float64)


def factors(op: Any, *, start: bool) -> Factors:
    generator = torch.Generator().manual_seed(3)
    n_out, n_in = op.shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = Factors(draw(4, n_in).requires_grad_(), draw(n_out, 4).requires_grad_(), draw(2, n_in), draw(n_out, 2))
    return made._replace(start_down=draw(4, n_in), start_up=draw(n_out, 4)) if start else made


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("start", [False, True])
def test_row_scale_reaches_the_factors_and_not_the_input(kind: str, start: bool) -> None:
    base, op, x = layer(kind)
    x.requires_grad_()
    f = factors(op, start=start)
    y = low_rank_branch(op, x, f)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    c = SCALE[:, None, None] if kind == "conv2d" else SCALE
    (d_x,) = torch.autograd.grad(y, x, g, retain_graph=True)
    wanted = torch.autograd.grad(y, [f.down, f.up], g * c)
    (d_base,) = torch.autograd.grad(op.full(base, x, op.canonical(base.weight)), x, g)
    scaled = f._replace(row_scale=SCALE)
    outputs = [low_rank_branch(op, x, scaled)]
    assert torch.equal(outputs[0], y)
    if kind != "conv2d":
        outputs.append(fused_linear(x, op.canonical(base.weight), base.bias, scaled))
    for output in outputs:
        got = torch.autograd.grad(output, [f.down, f.up, x], g)
        torch.testing.assert_close(got[:2], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[2], d_x + (0 if output is outputs[0] else d_base), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_observe_sees_what_the_weights_gradient_is_made_of(kind: str) -> None:
    base, op, x = layer(kind)
    f, seen = factors(op, start=False), []
    weight = op.canonical(base.weight).clone().requires_grad_()
    y = op.full(base, x, weight)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    (wanted,) = torch.autograd.grad(y, weight, g)
    watched = f._replace(observe=lambda g, x: seen.append(g.T @ x))
    low_rank_branch(op, x, watched).backward(g)
    if kind != "conv2d":
        fused_linear(x, op.canonical(base.weight), base.bias, watched).backward(g)
    assert len(seen) == (1 if kind == "conv2d" else 2)
    for found in seen:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("start", [False, True])
def test_a_sketch_is_gathered_beside_the_same_gradients(kind: str, start: bool) -> None:
    base, op, x = layer(kind)
    x.requires_grad_()
    f, weight = factors(op, start=start), op.canonical(base.weight).clone().requires_grad_()
    y = op.full(base, x, weight)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    (whole,) = torch.autograd.grad(y, weight, g)
    probe = torch.randn(op.shape[0], 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    branches = [lambda f: low_rank_branch(op, x, f)]
    if kind != "conv2d":
        branches.append(lambda f: fused_linear(x, op.canonical(base.weight), base.bias, f))
    for branch in branches:
        sketch = torch.ones(3, op.shape[1], dtype=torch.float64)
        wanted = torch.autograd.grad(branch(f), [f.down, f.up, x], g)
        got = torch.autograd.grad(branch(f._replace(probe=probe, sketch=sketch)), [f.down, f.up, x], g)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sketch, 1 + probe.T @ whole, rtol=1e-12, atol=1e-12)


def test_under_dropout_both_see_what_the_branch_saw() -> None:
    base, op, x = layer("linear")
    f, seen = factors(op, start=False), []
    watched = f._replace(observe=lambda g, x: seen.append((g, x.clone())), row_scale=SCALE)
    y = fused_linear(x, base.weight, base.bias, watched, 0.5)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    d_down, d_up = torch.autograd.grad(y, [f.down, f.up], g)
    ((_, dropped),) = seen
    assert 0.2 < (dropped == 0).double().mean() < 0.8
    torch.testing.assert_close(d_up, (g * SCALE).T @ (dropped @ f.down.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_down, ((g * SCALE) @ f.up).T @ dropped, rtol=1e-12, atol=1e-12)


def test_under_dropout_the_sketch_is_that_of_what_the_branch_saw() -> None:
    base, op, x = layer("linear")
    f, seen = factors(op, start=True), []
    probe, sketch = torch.randn(16, 3, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
    watched = f._replace(observe=lambda g, x: seen.append(g.T @ x), probe=probe, sketch=sketch)
    fused_linear(x, base.weight, base.bias, watched, 0.5).square().sum().backward()
    torch.testing.assert_close(sketch, probe.T @ seen[0], rtol=1e-12, atol=1e-12)
