"""The recomputing linear op equals the plain formula, whichever way it multiplies, and keeps nothing wide."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loratlas.engine import bitmask, recompute
from loratlas.engine.recompute import recomputed_linear

R = 6


def make(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] * b[None]).flatten(0, 1)


def problem(across: bool, n: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n_out, n_in = (6, 9) if across else (9, 6)
    theta = [randn(2, 3).float().to(dtype), randn(3, 6)]
    return {
        "x": randn(n, n_in).requires_grad_(True),
        "weight": randn(n_out, n_in),
        "bias": randn(n_out).requires_grad_(True),
        "basis": randn(9, 8)[:, :R],  # a view, as of a larger basis
        "theta": [t.requires_grad_(True) for t in theta],
        "across": across,
    }


def plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: Tensor, theta: list[Tensor], across: bool
) -> Any:
    update = (basis @ make(*theta)).T if across else basis @ make(*theta)
    return x @ update.T if weight is None else F.linear(x, weight, bias) + x @ update.T


def run(p: dict[str, Any], **options: Any) -> Tensor:
    return recomputed_linear(
        p["x"], p["weight"], p["bias"], p["basis"], make, *p["theta"], across=p["across"], **options
    )


def gradients(y: Tensor, p: dict[str, Any]) -> list[Tensor]:
    wanted = [p["x"], *p["theta"], *([] if p["bias"] is None else [p["bias"]])]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * g).sum(), wanted)]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("summed", "wide"), list(itertools.product([False, True], repeat=2)))
def test_every_way_to_multiply_gives_the_formula(
    across: bool, summed: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "_sum_is_cheaper", lambda *_, **__: summed)
    monkeypatch.setattr(recompute, "_wide_gradient_is_cheaper", lambda *_: wide)
    p = problem(across)
    for ours, theirs in zip(gradients(run(p), p), gradients(plain(**p), p), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("n", [1, 4, 40])
def test_the_branch_alone_and_any_number_of_rows(across: bool, n: int) -> None:
    p = problem(across, n)
    for weight, bias in ((p["weight"], p["bias"]), (None, None)):
        each = {**p, "weight": weight, "bias": bias}
        for ours, theirs in zip(gradients(run(each), each), gradients(plain(**each), each), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    stacked = {**p, "x": p["x"].detach().view(1, n, -1).requires_grad_(True)}
    torch.testing.assert_close(run(stacked)[0], run(p))
    frozen = {**p, "x": p["x"].detach(), "theta": [t.detach() for t in p["theta"]]}
    torch.testing.assert_close(run(frozen), run(p))
    only = {**p, "theta": [p["theta"][0].detach(), p["theta"][1]]}
    got, want = (torch.autograd.grad(y.sum(), only["theta"][1]) for y in (run(only), plain(**only)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("across", [False, True])
def test_dropout_touches_the_branch_alone(across: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(across, 40)
    drawn: list[tuple[Tensor, float]] = []
    draw = bitmask.draw
    monkeypatch.setattr(bitmask, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    y = gradients(run(p, dropout=0.3), p)
    bits, stays = drawn[0]
    mask = bitmask.unpack(bits, p["x"].detach()) / stays
    branch = {**p, "weight": None, "bias": None}
    expected = F.linear(p["x"], p["weight"], p["bias"]) + plain(**{**branch, "x": p["x"] * mask})
    for ours, theirs in zip(y, gradients(expected, p), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("across", [False, True])
def test_half_precision_does_not_lose_a_small_update(across: bool) -> None:
    p = problem(across, 40, torch.bfloat16)
    p["theta"] = [(1e-4 * p["theta"][0].detach().float()).requires_grad_(True), p["theta"][1].detach().float()]
    p["x"] = torch.eye(p["weight"].shape[1], dtype=torch.bfloat16).repeat(8, 1)
    p["weight"], p["bias"] = torch.full_like(p["weight"], 0.0), None
    update = plain(**{**p, "x": p["x"].float(), "basis": p["basis"].float(), "weight": None})
    assert (run(p).float() - update).norm() < 1e-2 * update.norm()


@pytest.mark.parametrize(("across", "expected"), [(False, "x"), (True, "narrow")])
def test_what_is_kept(across: bool, expected: str) -> None:
    p = problem(across, 40)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(p)
    own = {t.untyped_storage().data_ptr() for t in (p["weight"], p["basis"], *p["theta"])}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in others] == [(40, R)]
    assert (others[0].data_ptr() == p["x"].data_ptr()) == (expected == "x")


def test_autocast_and_second_derivatives() -> None:
    p = problem(False, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(p)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(**p), rtol=0.05, atol=0.1)
    (first,) = torch.autograd.grad(run(p).square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
