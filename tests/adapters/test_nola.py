"""NOLA: what its equations promise, files of seeds and coefficients, and bases that are drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from toys import TARGETS, Toy, distance, inputs, train, trainable, view, views

from loratlas import AtlasLoraConfig, NolaConfig, RandLoraConfig, SVFitConfig, UserError
from loratlas.linalg.seeded import Stream

R, K = 3, 10


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    model = get_peft_model(Toy(dtype=dtype), config(**options))
    for p in trainable(model):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


def config(**options: Any) -> NolaConfig:
    return NolaConfig(**{"r": R, "num_basis": K, "target_modules": list(TARGETS), **options})


def test_so_many_coefficients_train_whatever_the_layer_and_the_rank() -> None:
    assert [p.numel() for p in trainable(adapted())] == 4 * [K]
    assert [p.numel() for p in trainable(adapted(r=5, num_basis_b=7))] == 2 * [K, 7]
    for t in views(adapted()):
        assert torch.linalg.matrix_rank(t.layer.method.delta_weight(t)) == R


def test_the_start_is_loras_and_every_layer_has_its_own_numbers() -> None:
    model = get_peft_model(Toy(), config())
    first, second = views(model)
    assert not first.coef_A.any()
    assert first.A0.abs().max() <= 12**-0.5
    assert first.A0.std() == pytest.approx((1 / 36) ** 0.5, rel=0.2)
    assert len({*first.seeds.tolist(), *second.seeds.tolist()}) == 6
    assert torch.equal(view(get_peft_model(Toy(), config())).seeds, first.seeds)
    assert not torch.equal(view(get_peft_model(Toy(), config(seed=1))).seeds, first.seeds)


def test_the_scale_of_the_bases() -> None:
    t = view(adapted())
    assert t.bases_A.abs().max() == pytest.approx(K**-0.5, rel=0.05)
    one = view(adapted(basis_scale="one"))
    torch.testing.assert_close(t.bases_A * K**0.5, one.bases_A, rtol=1e-6, atol=1e-6)


def test_vit_has_no_start_and_does_not_begin_at_zero() -> None:
    model = get_peft_model(Toy(), config(variant="vit", num_basis_b=5))
    t = view(model)
    assert t.A0 is None
    assert t.scaling == 1 / R
    assert torch.equal(t.coef_B, torch.full((5,), 0.2))
    assert t.bases_A.abs().max() <= (12 * R) ** -0.5
    of_a, of_b = (b.view(-1, *shape).sum(0) for b, shape in ((t.bases_A, (12, R)), (t.bases_B, (R, 16))))
    expected = (of_a @ of_b).T / (R * K * 5)
    torch.testing.assert_close(t.layer.method.delta_weight(t), expected)
    assert expected.norm() > 0


def test_drawing_again_is_keeping_without_the_memory() -> None:
    kept, again = adapted(), adapted(keep_bases=False)
    assert view(again).bases_A is None
    x = inputs(dtype=torch.float64)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    for model in (kept, again):
        model(x).square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(kept(x), again(x), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(trainable(kept), trainable(again), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keep_bases", [True, False])
@pytest.mark.parametrize("variant", ["lm", "vit"])
def test_the_file_is_seeds_and_coefficients(tmp_path: Path, keep_bases: bool, variant: str) -> None:
    model, x = adapted(torch.float32, keep_bases=keep_bases, variant=variant), inputs()
    train(model, x, steps=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(value.numel() for value in tensors.values()) == [3, 3, 8, *4 * [K]]
    torch.manual_seed(99)
    torch.rand(5)
    again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert torch.equal(again(x), model(x))
    other = get_peft_model(Toy(), config(seed=5, variant=variant))
    other.load_adapter(tmp_path, "second")
    other.set_adapter("second")
    assert torch.equal(other(x), model(x))


def test_a_file_of_another_generator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(torch.float32).save_pretrained(tmp_path)
    drawn = Stream._drawn
    monkeypatch.setattr(Stream, "_drawn", lambda *arguments: -drawn(*arguments))
    with pytest.raises(UserError, match="shared tensor probe is drawn from a seed, and here other numbers come out"):
        PeftModel.from_pretrained(Toy(), tmp_path)


def test_coefficients_that_arrive_in_place_bring_their_bases_along() -> None:
    model, other, x = adapted(), adapted(seed=9), inputs(dtype=torch.float64)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [NolaConfig, SVFitConfig, RandLoraConfig])
def test_what_is_recomputed_waits_for_a_model_with_weights(cls: type) -> None:
    options = {"save_bases": False} if cls is SVFitConfig else {}
    model = get_peft_model(Toy().to("meta"), cls(r=R, target_modules=list(TARGETS), **options))
    assert all(p.is_meta for p in trainable(model))


def test_a_rank_beyond_the_layer_is_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"rank 64 exceeds the 12 useful directions of first"):
        assert [t.r for t in views(adapted(r=64))] == [12, 14]


def test_it_goes_below_what_lora_can_and_beats_it_at_equal_size() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16, dtype=torch.float64) / 4
    target = weight + torch.randn(16, 16, dtype=torch.float64) / 8
    lora = distance(400, AtlasLoraConfig(r=1, target_modules=["0"]), target, weight)  # 32 numbers, LoRA's least
    assert distance(400, NolaConfig(r=8, num_basis=16, target_modules=["0"]), target, weight) < 0.98 * lora
    assert distance(400, NolaConfig(r=8, num_basis=8, target_modules=["0"]), target, weight) < 0.95


def test_bad_options_name_the_field() -> None:
    for options, match in (
        ({"num_basis": 0}, "num_basis must be at least 1"),
        ({"num_basis_b": 0}, "num_basis_b must be at least 1"),
        ({"basis_scale": "k"}, "basis_scale must be"),
        ({"variant": "cnn"}, "variant must be"),
    ):
        with pytest.raises(UserError, match=match):
            config(**options)
