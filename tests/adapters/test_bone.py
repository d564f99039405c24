"""Bone and MiSS beyond the golden vectors: what each can express, their ties to LoRA, and Bone's tie to its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, distance, goal, inputs, train, view, views

from loratlas import AtlasMissConfig, BoneConfig, UserError
from loratlas.adapters.bone import Bone
from loratlas.engine.config import AtlasConfig
from loratlas.engine.export import export_lora
from loratlas.linalg import blocks

VARIANTS = ("bat-col", "bat-row", "bat-ab")


def bone(variant: str = "bat-col", kind: str = "linear", dtype: torch.dtype = torch.float64, **options) -> PeftModel:
    options = {"r": 2, "target_modules": list(TARGETS), **options}
    return get_peft_model(Toy(kind, dtype), BoneConfig(variant=variant, **options))


def miss(dtype: torch.dtype = torch.float64, **options: object) -> PeftModel:
    return get_peft_model(Toy(dtype=dtype), AtlasMissConfig(**{"r": 4, "target_modules": list(TARGETS), **options}))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(t) -> Tensor:
    weight = t.layer.base_matrix()
    return (t.layer.method.merged(t, weight) - weight).detach()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_every_variant_starts_at_the_base_and_merges_to_its_forward(variant: str, kind: str) -> None:
    x, model = inputs(kind, torch.float64), bone(variant, kind)
    assert torch.equal(model(x), Toy(kind, torch.float64)(x))
    train(model, x, steps=6)
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_dense_formula(variant: str) -> None:
    model, x = bone(variant), inputs(dtype=torch.float64).requires_grad_()
    train(model, x.detach(), steps=3)
    first, second = views(model)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def dense(t, x: Tensor) -> Tensor:
        return nn.functional.linear(x, t.layer.method.merged(t, t.layer.base_matrix()), t.layer.get_base_layer().bias)

    fast = torch.autograd.grad(model(x).square().sum(), leaves)
    slow = torch.autograd.grad(dense(second, torch.tanh(dense(first, x))).square().sum(), leaves)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_under_autocast_the_weight_is_still_made_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bone(dtype=torch.float32, target_modules=["first"])
    train(model, inputs(), steps=3)
    t, made = view(model), []
    expected, merged = t.layer.method.merged(t, t.layer.base_matrix()), Bone.merged

    def recorded(*args: Any) -> Tensor:
        made.append(merged(*args))
        return made[-1]

    monkeypatch.setattr(Bone, "merged", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        assert t.layer(inputs()).dtype == torch.bfloat16
    assert torch.equal(made[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantised_base_trains_and_stays_as_it_is(variant: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    toy, x = Toy().eval(), inputs()
    torchao.quantize_(toy, torchao.Int8WeightOnlyConfig())
    before, stored = toy(x), toy.first.weight.qdata.clone()
    model = get_peft_model(toy, BoneConfig(r=2, variant=variant, target_modules=list(TARGETS)))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    train(model, x, steps=20)
    after = model(x)
    assert (after - goal(after)).square().mean() < 0.9 * (before - goal(before)).square().mean()
    assert torch.equal(view(model).layer.get_base_layer().weight.qdata, stored)


def test_equal_blocks_get_equal_updates_and_all_of_them_full_rank() -> None:
    t = view(bone("bat-col", r=4, target_modules=["first"]))
    weight = t.layer.get_base_layer().weight
    with torch.no_grad():
        t.D.copy_(draw(4, 4, 4))
        assert torch.linalg.matrix_rank(update(t)) == 12
        weight[:, 4:8] = weight[:, :4]
    delta = update(t)
    assert torch.equal(delta[:, 4:8], delta[:, :4])
    assert not torch.allclose(delta[:, 8:], delta[:, :4])


def test_the_first_gradient_differs_from_that_of_miss_by_the_frozen_blocks() -> None:
    x, g = inputs(dtype=torch.float64), draw(6, 16)
    bat, shared = bone("bat-col", r=4, target_modules=["first"]), miss(target_modules=["first"])
    for model in (bat, shared):
        (model.base_model.model.first(x) * g).sum().backward()
    t = view(bat)
    by_block = (g.T @ x).view(4, 4, 3, 4)  # G[a, p, b, q]
    frozen = t.layer.base_matrix().view(4, 4, 3, 4)
    torch.testing.assert_close(t.D.grad, torch.einsum("apbk,apbq->akq", frozen, by_block) + by_block.sum(2))
    torch.testing.assert_close(view(shared).D.grad, by_block.sum(2).permute(2, 0, 1).reshape(4, 16))


def test_miss_is_a_lora_with_a_fixed_shard_sum(tmp_path: Path) -> None:
    model, x = miss(torch.float32, r=5), inputs()
    train(model, x)
    t = view(model)
    delta = update(t)
    assert torch.linalg.matrix_rank(delta) <= 5
    torch.testing.assert_close(delta, t.D.T.detach()[:, torch.arange(12) % 5], rtol=0, atol=1e-6)
    assert export_lora(model, tmp_path / "lora").rank == 5
    stock = PeftModel.from_pretrained(Toy(), tmp_path / "lora")
    torch.testing.assert_close(stock(x), model(x), rtol=1e-6, atol=1e-6)


def test_mini_repeats_its_columns_and_counts_as_few_parameters() -> None:
    model = miss(mini_r=2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * 2
    t = view(model)
    with torch.no_grad():
        t.D.copy_(draw(4, 2))
    torch.testing.assert_close(update(t), t.D.T.detach().repeat(8, 3))


@pytest.mark.parametrize("mini", [None, 2])
def test_miss_equals_that_of_peft(mini: int | None) -> None:
    ours, options = miss(mini_r=mini, r=5), {"init_weights": "mini", "mini_r": 2} if mini else {}
    theirs = get_peft_model(Toy(dtype=torch.float64), MissConfig(r=5, target_modules=list(TARGETS), **options))
    x = inputs(dtype=torch.float64)
    for name in TARGETS:
        d, block = view(ours, name).D, theirs.get_submodule(f"base_model.model.{name}").miss_block["default"]
        with torch.no_grad():
            d.copy_(draw(*d.shape))
            block.copy_(d)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def fit(config: AtlasConfig, target: Tensor, weight: Tensor) -> float:
    return distance(1500, config, target, weight)


def test_each_fits_its_own_updates_and_not_those_of_the_other() -> None:
    weight, own = draw(16, 16), {"r": 4, "target_modules": ["0"]}
    block = 0.3 * draw(4, 4, 4, seed=1)
    affine = weight + blocks.affine_rows(weight, block, block)
    shared = weight + 0.3 * draw(16, 4, seed=2).repeat(1, 4)
    assert fit(BoneConfig(**own), affine, weight) < 1e-6
    assert fit(AtlasMissConfig(**own), affine, weight) > 0.1
    assert fit(AtlasMissConfig(**own), shared, weight) < 1e-6
    assert fit(BoneConfig(**own), shared, weight) > 0.1


@pytest.mark.parametrize("variants", [("bat-col", "bat-row"), ("bat-row", "bat-ab"), ("bat-ab", "bat-col")])
def test_several_adapters_act_one_on_the_weight_of_the_other(variants: tuple[str, str]) -> None:
    model, x = bone(variants[0]), inputs(dtype=torch.float64)
    model.add_adapter("second", BoneConfig(r=2, variant=variants[1], target_modules=list(TARGETS)))
    with torch.no_grad():
        for name in ("default", "second"):
            for t in views(model, name):
                for tensor in (t.D, t.A, t.B):
                    if tensor is not None:
                        tensor.copy_(0.3 * draw(*tensor.shape))
    model.base_model.set_adapter(["default", "second"])
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    t, weight = view(model, adapter="default"), Toy(dtype=torch.float64).first.weight
    once = t.layer.method.merged(t, weight)
    twice = view(model, adapter="second")
    torch.testing.assert_close(t.layer.get_base_layer().weight, twice.layer.method.merged(twice, once))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward(variant: str) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(64, 64, bias=False)), BoneConfig(r=8, variant=variant, target_modules=["0"])
    )
    x = torch.randn(3, 64, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(0 if tensor.untyped_storage().data_ptr() in own else tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sum(kept) > 0
    assert max(kept) <= max(x.nbytes, 8 * 8 * 8 * 4)


def test_another_base_is_refused_and_the_same_in_other_clothes_is_not(tmp_path: Path) -> None:
    model = bone(dtype=torch.bfloat16)
    train(model, inputs(dtype=torch.bfloat16), steps=2)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(Toy(dtype=torch.bfloat16).float(), tmp_path)
    with pytest.raises(UserError, match=r"^module first: its weight is not the one that this adapter was trained on"):
        PeftModel.from_pretrained(Toy(seed=1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "check_base": False}))
    PeftModel.from_pretrained(Toy(seed=1), tmp_path)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_a_merged_base_still_counts_as_the_base(tmp_path: Path) -> None:
    model = bone()
    train(model, inputs(dtype=torch.float64), steps=2)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.load_adapter(str(tmp_path), "second")


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match=r"^module first: its 16 x 12 weight does not divide into 5 x 5 .* take r=4"):
        bone(r=5)
    with pytest.raises(UserError, match=r"^module first: shards of r=13 inputs are wider .* take r=12 or less"):
        miss(r=13)
    with pytest.raises(UserError, match=r"^module first: mini_r=5 does not divide its 16 outputs: take 4 "):
        miss(mini_r=5)
    for options in ({"variant": "bat"}, {"lora_dropout": 0.1}):
        with pytest.raises(UserError, match=f"^BoneConfig: {next(iter(options))} must be "):
            BoneConfig(**options)
    with pytest.raises(UserError, match=r"^AtlasMissConfig: mini_r must be at least 1"):
        AtlasMissConfig(mini_r=0)
