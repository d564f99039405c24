"""LoLDU: exact from every start, and what its equations promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from toys import Toy, distance, inputs, raw, trainable, view, views

from loratlas import AtlasLoraConfig, LoLDUConfig, UserError
from loratlas.adapters.loldu import STARTS, start

R = 5


def adapted(r: int | None = R, dtype: torch.dtype = torch.float64, kind: str = "linear", **options: Any) -> PeftModel:
    return get_peft_model(Toy(kind, dtype), LoLDUConfig(r=r, target_modules=["first", "second"], **options))


def change(model: nn.Module, seed: int = 3) -> None:
    for p in trainable(model):
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_scale", [False, True])
@pytest.mark.parametrize("method", STARTS)
def test_every_start_is_the_base_bit_for_bit(method: str, train_scale: bool, dtype: torch.dtype) -> None:
    model, x = adapted(dtype=dtype, init_method=method, train_scale=train_scale, lora_alpha=3.0), inputs(dtype=dtype)
    expected = Toy(dtype=dtype)(x)
    assert torch.equal(model(x), expected)
    change(model)
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


def test_starts_are_the_papers() -> None:
    pivots = torch.tensor([4.0, -2.0, 6.0, 1.0])
    mean = 2.25
    assert torch.equal(start("lu", pivots, 0), pivots)
    assert torch.equal(start("constant", pivots, 0), torch.full((4,), mean))
    many = torch.cat([pivots] * 500)
    uniform, normal = start("uniform", many, 0), start("normal", many, 0)
    assert uniform.abs().max() <= mean / 2
    assert abs(float(uniform.mean())) < 0.05
    assert abs(float(normal.mean()) - mean) < 0.3
    assert abs(float(normal.std() / many.std()) - 1.0) < 0.1
    assert torch.equal(uniform, start("uniform", many, 0))
    assert not torch.equal(uniform, start("uniform", many, 1))
    assert torch.isfinite(start("normal", pivots[:1], 0)).all()


@pytest.mark.parametrize("train_scale", [False, True])
def test_r_numbers_train_and_the_update_has_rank_r(train_scale: bool) -> None:
    model, x = adapted(train_scale=train_scale, lora_alpha=10.0), inputs(dtype=torch.float64)
    assert sum(p.numel() for p in trainable(model)) == 2 * (R + train_scale)
    change(model)
    y = model(x)
    for t in views(model):
        delta = t.layer.method.delta_weight(t)
        gain = 1.0 if t.gain is None else t.gain
        assert torch.linalg.matrix_rank(delta) == R
        torch.testing.assert_close(delta, 2.0 * (t.L * (gain * t.z - t.z0)) @ t.R)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    before = {name: raw(value) for name, value in Toy(dtype=torch.float64).state_dict().items()}
    unloaded = model.unload()
    assert {name: raw(value) for name, value in unloaded.state_dict().items()} == before


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_gradient_is_l_g_u(kind: str) -> None:
    model, x = adapted(kind=kind, train_scale=True, lora_alpha=10.0), inputs(kind, torch.float64)
    change(model)
    model(x).square().sum().backward()
    t = view(model, "second")
    merged = model.merge_and_unload()
    merged.second.weight.requires_grad_(True)
    merged(x).square().sum().backward()
    gradient = t.op.canonical(merged.second.weight.grad)
    each = 2.0 * torch.einsum("oi,on,in->i", t.L, gradient, t.R)
    torch.testing.assert_close(t.z.grad, t.gain * each)
    torch.testing.assert_close(t.gain.grad, (t.z * each).sum())


def test_twice_the_diagonal_is_twice_the_weight() -> None:
    for t in views(adapted(None, init_method="lu")):
        assert t.r == min(t.op.shape)
        t.z.data.mul_(2.0)
        weight = t.layer.base_matrix()
        torch.testing.assert_close(t.layer.method.merged(t, weight), 2.0 * weight)


def test_without_bases_the_file_is_small_exact_and_checked(tmp_path: Path) -> None:
    model, x = adapted(dtype=torch.float32, save_bases=False), inputs()
    change(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2000
    with pytest.raises(UserError, match=r"module first: .*another base weight"):
        PeftModel.from_pretrained(Toy(seed=1), tmp_path)


def test_a_singular_weight_trains() -> None:
    base = Toy(dtype=torch.float64)
    base.first.weight.data[:, 2:] = 0.0
    model = get_peft_model(base, LoLDUConfig(target_modules=["first"]))
    model(inputs(dtype=torch.float64)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model))


def test_it_fits_rescaled_pivots_that_lora_cannot() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16, dtype=torch.float64) / 4
    p, lower, upper = torch.linalg.lu(weight)
    factors = 1.0 + 0.5 * torch.randn(16, dtype=torch.float64)
    target = p @ (lower * factors) @ upper
    assert distance(600, LoLDUConfig(target_modules=["0"]), target, weight) < 1e-3
    assert distance(600, AtlasLoraConfig(r=1, target_modules=["0"]), target, weight) > 0.3


def test_bad_options_name_the_field() -> None:
    with pytest.raises(UserError, match=r"init_method must be one of lu, uniform.*'xavier'"):
        LoLDUConfig(init_method="xavier")
