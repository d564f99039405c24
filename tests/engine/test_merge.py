"""Merging: the right weight, bit-exact ways back, refusals that change nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from toys import KINDS, METHODS, TARGETS, Toy, adapted, base_bytes, config, inputs, train, view, views
from transformers import GPT2Config, GPT2LMHeadModel

from loratlas import AtlasLoraConfig

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def two_adapters(dtype: torch.dtype = torch.float32, kind: str = "linear") -> PeftModel:
    """Adapters "default" (plain LoRA) and "other" (PiSSA), both trained."""
    model = adapted("lora", kind, dtype)
    train(model, inputs(kind, dtype), steps=4)
    model.add_adapter("other", config("pissa", r=3))
    model.set_adapter("other")
    train(model, inputs(kind, dtype), steps=4)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_merging_keeps_the_function_and_unmerging_the_bits(name: str, kind: str, dtype: torch.dtype) -> None:
    model, x = adapted(name, kind, dtype), inputs(kind, dtype)
    train(model, x)
    before, expected = base_bytes(model), model(x)
    model.merge_adapter()
    assert base_bytes(model) != before
    weight = view(model).layer.base_layer.weight
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    assert not weight.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    model.unmerge_adapter()
    assert base_bytes(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_gives_a_plain_model(kind: str, dtype: torch.dtype) -> None:
    model, x = adapted("srlora", kind, dtype), inputs(kind, dtype)
    train(model, x)
    expected = model(x)
    plain = model.merge_and_unload(safe_merge=True)
    assert {type(module) for module in plain.modules()} == {type(module) for module in Toy(kind).modules()}
    torch.testing.assert_close(plain(x), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_thousand_cycles_do_not_drift() -> None:
    model = adapted("srlora", dtype=torch.bfloat16)
    train(model, inputs("linear", torch.bfloat16))
    before = base_bytes(model)
    model.merge_adapter()
    merged = base_bytes(model)
    for _ in range(1000):
        model.unmerge_adapter()
        model.merge_adapter()
    assert base_bytes(model) == merged
    model.unmerge_adapter()
    assert base_bytes(model) == before


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    model = two_adapters(dtype, kind)
    wanted = {}
    for layer in TARGETS:
        found = view(model, layer).layer
        exact = found.base_layer.weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for name in ("default", "other"):
            exact = exact + found.get_delta_weight(name)
        wanted[layer] = exact.to(dtype)
    before = base_bytes(model)
    model.merge_adapter(["default", "other"])
    together = base_bytes(model)
    for layer in TARGETS:
        assert torch.equal(view(model, layer).layer.base_layer.weight, wanted[layer])
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
    assert base_bytes(model) == together
    assert view(model).layer.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert base_bytes(model) == before


def test_merged_adapters_show_in_the_output_whatever_is_active() -> None:
    model, x = two_adapters(), inputs()
    expected = Toy()
    with torch.no_grad():
        for layer in TARGETS:
            expected.get_submodule(layer).weight.add_(view(model, layer).layer.get_delta_weight("default"))
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), expected(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merged_first", [[], ["default"]], ids=["nothing-merged", "one-merged"])
@pytest.mark.parametrize("broken", TARGETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_and_changes_nothing(value: float, broken: str, merged_first: list[str]) -> None:
    model, x = two_adapters(), inputs()
    untouched = base_bytes(model)
    with torch.no_grad():
        view(model, broken, "other").A[0, 0] = value
    if merged_first:
        model.merge_adapter(merged_first)
    before, expected = base_bytes(model), model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"NaNs detected.*other"):
            model.merge_adapter(["other"], safe_merge=True)
    assert base_bytes(model) == before
    assert all(t.layer.merged_adapters == merged_first for t in views(model))
    if merged_first:
        assert torch.equal(model(x), expected)
        model.unmerge_adapter()
    assert base_bytes(model) == untouched


def test_unsafe_merge_takes_what_it_is_given() -> None:
    model = two_adapters()
    with torch.no_grad():
        view(model, "first", "other").A[0, 0] = float("nan")
    model.merge_adapter(["other"])
    assert torch.isnan(view(model).layer.base_layer.weight).any()


def test_disable_takes_a_merged_adapter_out() -> None:
    model, x = adapted("srlora"), inputs()
    train(model, x)
    trained = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), Toy()(x))
    assert torch.equal(model(x), trained)


def test_unload_after_merging_gives_the_base() -> None:
    model, x = adapted("srlora"), inputs()
    train(model, x)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.unload()(x), Toy()(x))


def test_a_new_adapter_starts_from_the_untouched_weight_while_another_is_merged() -> None:
    model = adapted("srlora")
    train(model, inputs())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", config("srlora"))
    fresh = view(adapted("srlora"))
    assert torch.equal(view(model, adapter="other").A, fresh.A)
    assert torch.equal(view(model, adapter="other").RB, fresh.RB)


def test_merged_adapters_are_not_deleted() -> None:
    model = two_adapters()
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_merging_twice_and_unmerging_twice_warn() -> None:
    model = adapted("pissa")
    train(model, inputs(), steps=2)
    model.merge_adapter()
    merged = base_bytes(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert base_bytes(model) == merged
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_the_weight_kept_aside_follows_the_model() -> None:
    model, x = adapted("srlora"), inputs("linear", torch.float64)
    train(model, inputs())
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert view(model).layer.base_layer.weight.dtype == torch.float64
    assert torch.equal(view(model).layer.base_layer.weight, Toy().first.weight.double())
    assert model(x).dtype == torch.float64


def test_tied_embeddings_stay_what_they_are_elsewhere() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    assert base.lm_head.weight is base.transformer.wte.weight
    head, ids = base.lm_head.weight.clone(), torch.arange(8)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about tied targets
        model = get_peft_model(copy.deepcopy(base), AtlasLoraConfig(target_modules=["wte"], r=4, init_weights=False))
    expected = model(ids).logits
    assert not torch.allclose(expected, base(ids).logits, atol=1e-3)
    model.merge_adapter()
    assert torch.equal(model.base_model.model.lm_head.weight, head)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    inner = model.base_model.model
    assert inner.lm_head.weight is inner.transformer.wte.base_layer.weight
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weight_has_the_shape_of_the_stored_weight(kind: str) -> None:
    model = adapted("lora", kind, init_weights=False)
    for t in views(model):
        assert t.layer.get_delta_weight("default").shape == t.layer.base_layer.weight.shape
