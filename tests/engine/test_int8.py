"""Bases quantised by torchao: exact start and ways back, merging with the recipe, a refusal without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from toys import EXACT_START, TARGETS, Toy, config, goal, inputs, train, view, views

from loratlas import LoLDUConfig, LoraGAConfig, SVFitConfig, UserError, calibrate

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")


def quantised() -> Toy:
    toy = Toy().eval()
    torchao.quantize_(toy, torchao.Int8WeightOnlyConfig())
    assert type(toy.first.weight).__name__ == "Int8Tensor"
    return toy


def contents(model: torch.nn.Module) -> list[Tensor]:
    """Integers and scales of the quantised weights."""
    weights = [model.get_submodule(name).weight for name in TARGETS]
    return [part.clone() for weight in weights for part in (weight.qdata, weight.scale)]


def base_contents(model: PeftModel) -> list[Tensor]:
    parts = [view(model, name).layer.base_layer.weight for name in TARGETS]
    return [part for weight in parts for part in (weight.qdata, weight.scale)]


def with_recipe() -> PeftModel:
    """As transformers would load it: the model carries its quantiser."""
    toy = quantised()
    recipe = type("Recipe", (), {"get_apply_tensor_subclass": staticmethod(torchao.Int8WeightOnlyConfig)})
    toy.hf_quantizer = type("Quantizer", (), {"quantization_config": recipe})
    return get_peft_model(toy, config("srlora"))


@pytest.mark.parametrize("name", EXACT_START)
def test_start_and_every_way_back_are_bitwise(name: str) -> None:
    x = inputs()
    expected, stored = quantised()(x), contents(quantised())
    model = get_peft_model(quantised(), config(name))
    assert torch.equal(model(x), expected)
    train(model, x)
    if name == "srlora":
        assert [int(t.events) for t in views(model)] == [4, 4]
    trained = model(x)
    assert (trained - goal(trained)).square().mean() < 0.9 * (expected - goal(expected)).square().mean()
    assert all(torch.equal(a, b) for a, b in zip(base_contents(model), stored, strict=True))
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.add_adapter("other", config(name, r=2))
    model.set_adapter("other")
    assert torch.equal(model(x), expected)
    model.set_adapter("default")
    assert torch.equal(model(x), trained)
    model.delete_adapter("other")
    plain = model.unload()
    assert torch.equal(plain(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(contents(plain), stored, strict=True))


def test_start_is_the_svd_of_the_dequantised_weight() -> None:
    t = view(get_peft_model(quantised(), config("srlora", r_target=4)))
    u, s, vh = torch.linalg.svd(quantised().first.weight.dequantize().float(), full_matrices=False)
    torch.testing.assert_close(t.B @ t.A, (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)


def test_merging_without_a_recipe_is_refused_and_changes_nothing() -> None:
    model, x = get_peft_model(quantised(), config("srlora")), inputs()
    train(model, x)
    trained, stored = model(x), [part.clone() for part in base_contents(model)]
    for _ in range(2):
        with pytest.raises(UserError, match=r"quantised without a quantisation config.*TorchAoConfig"):
            model.merge_adapter()
        assert not any(t.layer.merged for t in views(model))
        assert torch.equal(model(x), trained)
        assert all(torch.equal(a, b) for a, b in zip(base_contents(model), stored, strict=True))


def test_merging_with_a_recipe_requantises_and_unmerging_restores_the_bits() -> None:
    model, x = with_recipe(), inputs()
    train(model, x)
    trained, stored = model(x), [part.clone() for part in base_contents(model)]
    delta = view(model).layer.get_delta_weight("default")
    exact = quantised().first.weight.dequantize() + delta
    model.merge_adapter()
    merged = view(model).layer.base_layer.weight
    assert type(merged).__name__ == "Int8Tensor"
    step = exact.abs().amax(1, keepdim=True) / 127
    assert bool(((merged.dequantize() - exact).abs() <= 0.51 * step).all())
    assert (model(x) - trained).abs().max() < 0.05 * trained.abs().max()
    model.unmerge_adapter()
    assert torch.equal(model(x), trained)
    assert all(torch.equal(a, b) for a, b in zip(base_contents(model), stored, strict=True))


def test_in_place_is_refused_with_the_module_and_the_way_out() -> None:
    with pytest.raises(UserError, match=r"module first: .*dense base layer.*fuse_mode='difference'"):
        get_peft_model(quantised(), config("srlora-inplace"))


def test_statistics_of_the_full_model_serve_its_quantised_copy() -> None:
    x, cfg = inputs(), LoraGAConfig(r=4, target_modules=TARGETS)

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - goal(model(batch))).square().mean()

    with pytest.raises(UserError, match=r"module first is a Linear without a dense weight .*config.calibration"):
        calibrate(quantised(), cfg, [x], loss=loss)
    calibrate(Toy(), cfg, [x], loss=loss)
    model = get_peft_model(quantised(), cfg)
    assert view(model, "first").B.abs().max() > 0.1
    assert torch.equal(model(x), quantised()(x))


@pytest.mark.parametrize("save_bases", [True, False])
@pytest.mark.parametrize("cls", [SVFitConfig, LoLDUConfig])
def test_bases_of_a_quantised_weight(cls: type, save_bases: bool, tmp_path: Path) -> None:
    x = inputs()
    model = get_peft_model(quantised(), cls(r=4, save_bases=save_bases, target_modules=TARGETS))
    assert torch.equal(model(x), quantised()(x))
    train(model, x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(quantised(), tmp_path)(x), model(x))
