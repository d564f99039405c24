"""RandLoRA: what its equations promise, agreement with PEFT's, and what it can fit."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from toys import TARGETS, Toy, distance, inputs, trainable, view, views

from loratlas import AtlasLoraConfig, RandLoraConfig, UserError
from loratlas.engine.method import View

R = 5


def adapted(dtype: torch.dtype = torch.float64, kind: str = "linear", **options: Any) -> PeftModel:
    model = get_peft_model(Toy(kind, dtype), config(**options))
    for p in trainable(model):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


def config(**options: Any) -> RandLoraConfig:
    return RandLoraConfig(**{"r": R, "target_modules": list(TARGETS), **options})


def delta(t: View) -> torch.Tensor:
    return t.layer.method.delta_weight(t).detach()


def test_the_update_has_full_rank_and_so_many_parameters() -> None:
    model = adapted()
    for t in views(model):
        m = min(t.op.shape)
        n = math.ceil(m / R)
        assert t.lam.numel() + t.gam.numel() == n * (R + m)
        assert torch.linalg.matrix_rank(delta(t)) == m


def test_it_is_the_sum_of_bases_in_the_official_pairing() -> None:
    for t in views(adapted()):
        m, wide, n = min(t.op.shape), max(t.op.shape), len(t.gam)
        a, b = t.A.double()[:, 0, :m], t.B.double()[:wide, :n]
        core = sum(
            torch.outer(b[:, p // R, p % R], t.lam[p // n, p % n] * a[p // n] * t.gam[p % n]) for p in range(n * R)
        )
        expected = 2 / math.sqrt(n) * (core if t.op.shape[1] == m else core.T)
        torch.testing.assert_close(delta(t), expected.detach())


@pytest.mark.parametrize("name", ["lam", "gam"])
def test_it_is_linear_in_each_diagonal(name: str) -> None:
    t = view(adapted())
    before = delta(t)
    getattr(t, name).data.mul_(-3.0)
    torch.testing.assert_close(delta(t), -3.0 * before)


def test_the_start() -> None:
    for t in views(get_peft_model(Toy(), config())):
        assert not t.lam.any()
        assert torch.equal(t.gam, torch.full_like(t.gam, 1 / min(t.op.shape)))
        assert t.A.std() == pytest.approx(1.0, abs=1e-6)
        assert t.B.std() == pytest.approx(1.0, abs=1e-6)
        assert t.B.abs().max() == pytest.approx(3**0.5, rel=0.1)


@pytest.mark.parametrize("basis", ["sparse", "very-sparse"])
def test_with_equal_tensors_it_is_pefts(basis: str) -> None:
    options = {"r": R, "target_modules": list(TARGETS)}
    theirs = get_peft_model(Toy(), peft.RandLoraConfig(**options, randlora_alpha=10, **{basis.replace("-", "_"): True}))
    ours, x = get_peft_model(Toy(), config(lora_alpha=10, scaling="peft", basis=basis)), inputs()
    for p in trainable(theirs):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    for t, name in zip(views(ours), TARGETS, strict=True):
        layer = getattr(theirs.base_model.model, name)
        t.lam.data.copy_(layer.randlora_lambda["default"])
        t.gam.data.copy_(layer.randlora_gamma["default"])
        torch.testing.assert_close(t.A, layer.randlora_A["default"])  # the same seed gives the same bases
        torch.testing.assert_close(t.B, layer.randlora_B["default"])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_many_rows_take_another_way_to_the_same_numbers(kind: str) -> None:
    model = adapted(kind=kind)
    x = torch.randn(200, 12, dtype=torch.float64)
    rows = torch.cat([model(row) for row in x.split(4)])
    torch.testing.assert_close(model(x), rows, rtol=1e-11, atol=1e-11)
    grads = [torch.autograd.grad(y.square().sum(), trainable(model)) for y in (model(x), rows)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_ranks_of_single_layers() -> None:
    model = adapted(rank_pattern={"second": 2})
    first, second = views(model)
    assert (first.r, second.r, len(second.gam)) == (5, 2, 7)
    assert torch.linalg.matrix_rank(delta(second)) == 14
    with pytest.warns(UserWarning, match=r"rank 64 exceeds the 12 useful directions of first"):
        assert [len(t.gam) for t in views(adapted(r=64))] == [1, 1]


def test_the_smallest_bases() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(5, 1)), config(target_modules=["0"]))
    t = next(iter(views(model)))
    assert t.A.abs().tolist() == [[[1.0]]]
    assert torch.isfinite(t.B).all()
    with pytest.raises(UserError, match="came out as zeros: use basis='dense'"):
        get_peft_model(nn.Sequential(nn.Linear(5, 1)), config(target_modules=["0"], basis="sparse", seed=1))


def test_dropout_acts_in_training_only() -> None:
    model, x = adapted(torch.float32, lora_dropout=0.5), inputs()
    assert torch.equal(model.eval()(x), adapted(torch.float32)(x))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(x), model.eval()(x))


def test_torch_func_takes_the_plain_formula() -> None:
    model, x = adapted(), inputs(dtype=torch.float64)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.func.grad(lambda v: torch.func.functional_call(model, v, (x,)).square().sum())(values)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-9)


def test_it_fits_flat_spectra_that_lora_cannot_and_not_the_other_way_round() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16, dtype=torch.float64) / 4
    flat = weight + torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q / 2
    low = weight + torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64) / 8
    rand, lora = (lambda: RandLoraConfig(r=6, target_modules=["0"])), AtlasLoraConfig(r=2, target_modules=["0"])
    # 3 (6 + 16) = 66 numbers train, and 2 (16 + 16) = 64 of LoRA
    assert distance(400, rand(), flat, weight) < 0.85 * distance(400, lora, flat, weight)
    assert distance(400, rand(), low, weight) > 0.2
    assert distance(400, AtlasLoraConfig(r=2, target_modules=["0"]), low, weight) < 1e-3


def test_bad_options_name_the_field() -> None:
    for options, match in (({"scaling": "sqrt"}, "scaling must be"), ({"basis": "ternary"}, "basis must be")):
        with pytest.raises(UserError, match=match):
            config(**options)
