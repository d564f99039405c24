"""The adapted layer: exact start, untouched base, and every way back to the base or to another adapter, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from toys import (
    EXACT_START,
    KINDS,
    METHODS,
    TARGETS,
    Toy,
    adapted,
    base_bytes,
    config,
    inputs,
    train,
    trainable,
    view,
    views,
)

from loratlas import AtlasLoraConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


SHAPES = [(kind, ndim) for kind in KINDS for ndim in (2, 3, 4) if ndim == 2 or kind in ("linear", "conv1d")]


@pytest.mark.parametrize(("kind", "ndim"), SHAPES)
@pytest.mark.parametrize("name", EXACT_START)
def test_start_is_the_base_bit_for_bit(name: str, kind: str, ndim: int, dtype: torch.dtype) -> None:
    model, x = adapted(name, kind, dtype), inputs(kind, dtype, ndim)
    expected = Toy(kind, dtype)(x)
    for mode in (True, False):
        y = model.train(mode)(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["pissa", "srlora"])
def test_start_is_exact_although_the_factors_are_not_zero(name: str) -> None:
    model = adapted(name)
    for t in views(model):
        assert t.A.abs().max() > 0.1
        assert t.B.abs().max() > 0.1
        assert torch.equal(t.layer.get_delta_weight("default"), torch.zeros_like(t.layer.base_layer.weight))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("name", EXACT_START)
def test_start_is_the_base_under_autocast(name: str, kind: str) -> None:
    model, x = adapted(name, kind), inputs(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = model(x), Toy(kind)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_single_rows_and_strided_inputs() -> None:
    model, base = adapted("srlora"), Toy()
    row, strided = inputs()[0], inputs(ndim=3).transpose(0, 1)
    assert not strided.is_contiguous()
    for x in (row, strided, inputs().expand(3, 6, 12)):
        assert torch.equal(model(x), base(x))
    train(model, inputs())
    torch.testing.assert_close(model(strided), model(strided.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_back_is_bitwise_after_training(name: str, kind: str, dtype: torch.dtype) -> None:
    base, x = Toy(kind, dtype), inputs(kind, dtype)
    before = base_bytes(base)
    model = get_peft_model(copy.deepcopy(base), config(name))
    train(model, x)
    if name.startswith("srlora"):
        assert [int(t.events) for t in views(model)] == [4, 4]
    trained = model(x)
    assert not torch.equal(trained, base(x))
    assert base_bytes(model) == before

    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), trained)

    model.add_adapter("other", config("pissa" if name in ("lora", "pissa") else name, r=2))
    model.set_adapter("other")
    if name in EXACT_START:
        assert torch.equal(model(x), base(x))
    train(model, x, steps=3)
    other = model(x)
    model.set_adapter("default")
    assert torch.equal(model(x), trained)
    model.set_adapter("other")
    assert torch.equal(model(x), other)
    model.delete_adapter("default")
    assert torch.equal(model(x), other)
    assert base_bytes(model) == before
    assert not any("default" in key for key in model.state_dict())

    plain = model.unload()
    assert isinstance(plain.first, type(base.first))
    assert torch.equal(plain(x), base(x))
    assert base_bytes(plain) == before


def test_adapter_tensors_are_fp32_and_fp64_only_on_fp64_bases(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for t in views(adapted("srlora", dtype=dtype)):
        for name in ("A", "B", "A0", "B0", "HA", "HB", "IA", "QB", "RA", "RB"):
            assert getattr(t, name).dtype == expected


def test_adapter_can_take_the_dtype_of_the_base() -> None:
    model = get_peft_model(Toy("linear", torch.bfloat16), config("srlora"), autocast_adapter_dtype=False)
    x = inputs("linear", torch.bfloat16)
    for t in views(model):
        assert {t.A.dtype, t.B.dtype, t.A0.dtype, t.B0.dtype, t.RA.dtype} == {torch.bfloat16}
        assert t.slot_dir.dtype == torch.int64
        assert torch.equal(t.A, t.A0)
    assert torch.equal(model(x), Toy("linear", torch.bfloat16)(x))
    train(model, x)
    assert [int(t.events) for t in views(model)] == [4, 4]
    assert model(x).dtype == torch.bfloat16


def test_only_the_factors_train() -> None:
    model = adapted("srlora")
    names = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"ATLAS_SRLORA_A", "ATLAS_SRLORA_B"}
    assert sum(p.numel() for p in trainable(model)) == 4 * (12 + 16) + 4 * (16 + 14)


@pytest.mark.parametrize("name", ["pissa", "srlora", "srlora-inplace"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_base_plus_delta_weight(name: str, kind: str) -> None:
    base, x = Toy(kind, torch.float64), inputs(kind, torch.float64)
    model = get_peft_model(copy.deepcopy(base), config(name, lora_alpha=3.0))
    train(model, x)
    with torch.no_grad():
        for layer in TARGETS:
            t = view(model, layer)
            base.get_submodule(layer).weight.add_(t.layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_hooks_on_the_base_layer_run(name: str) -> None:
    model, x = adapted(name), inputs()
    expected = model(x)
    expected.sum().backward()
    base, t = view(model, "second").layer.base_layer, view(model, "second")
    gradients = [t.A.grad.clone(), t.B.grad.clone()]
    seen: list[object] = []
    handle = base.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert seen == [(6, 14)]
    handle.remove()
    base.register_full_backward_hook(lambda module, given, made: seen.append("backward"))
    model.zero_grad()
    model(x).sum().backward()
    assert seen[1:] == ["backward"]
    for ours, before in zip((t.A.grad, t.B.grad), gradients, strict=True):
        torch.testing.assert_close(ours, before, rtol=1e-5, atol=1e-6)


def test_dropout_acts_on_the_branch_and_in_training_only() -> None:
    model = get_peft_model(Toy(), AtlasLoraConfig(target_modules=["first"], init_weights=False, lora_dropout=0.5))
    model, x = model.eval(), inputs()
    quiet = model(x)
    assert torch.equal(model(x), quiet)
    model.train()
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(first, quiet)
    torch.manual_seed(0)
    assert torch.equal(model(x), first)


def test_deepcopy_is_independent() -> None:
    model, x = adapted("srlora"), inputs()
    twin = copy.deepcopy(model)
    train(twin, x)
    assert torch.equal(model(x), Toy()(x))
    assert not torch.equal(twin(x), model(x))
