"""LoRAs that stock PEFT has saved, loaded as adapters of ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from toys import KINDS, TARGETS, Toy, adapted, base_bytes, goal, inputs, raw, train, trainable, views
from transformers import BertConfig, BertForSequenceClassification

import loratlas
from loratlas import AtlasLoraConfig, SRLoraConfig, UserError, load_lora
from loratlas.engine.export import export_lora

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def stock(folder: Path, kind: str = "linear", base: nn.Module | None = None, **options: Any) -> PeftModel:
    """A LoRA of PEFT with random factors, saved in `folder`."""
    options = {"target_modules": list(TARGETS), "r": 4, "init_lora_weights": False, **options}
    options["fan_in_fan_out"] = kind == "conv1d"
    model = get_peft_model(Toy(kind) if base is None else base, LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings.pop("tensors_sha256", None)  # as one must who changes the file on purpose
    (folder / "adapter_config.json").write_text(json.dumps(settings))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"lora_alpha": 6, "rank_pattern": {"second": 2}, "alpha_pattern": {"second": 12}},
    "rslora": {"use_rslora": True, "lora_alpha": 10},
    "biases": {"bias": "lora_only"},
    "one layer by regex": {"target_modules": ".*first"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_stock_peft_computes(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, x = stock(tmp_path, kind, **options), inputs(kind)
    ours = load_lora(Toy(kind), tmp_path)
    assert isinstance(ours.peft_config["default"], AtlasLoraConfig)
    assert {name for name, p in ours.named_parameters() if p.requires_grad and "bias" not in name} == set()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(x), Toy(kind)(x), atol=1e-3)
    if not options.get("bias"):
        assert base_bytes(ours) == base_bytes(Toy(kind))


def test_a_head_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **SIZES)).eval()
    base, ids = copy.deepcopy(net), torch.arange(5)[None]
    theirs = stock(tmp_path, base=net, target_modules=["query", "value"], task_type="SEQ_CLS")
    ours = load_lora(base, tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_peft_saves_with_its_base_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES)).eval()
    base, other, ids = copy.deepcopy(net), copy.deepcopy(net), torch.arange(5)[None]
    theirs = stock(tmp_path, base=net, target_modules=["query", "embed_tokens", "word_embeddings"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(name.endswith("base_layer.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(load_lora(base, tmp_path)(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(UserError, match=r"base weights of its own \(bert\.embeddings\.word_embeddings"):
        load_lora(other, tmp_path)


def test_training_goes_on_from_it_and_it_is_one_of_ours(tmp_path: Path) -> None:
    theirs, x = stock(tmp_path / "peft", lora_alpha=8), inputs()
    start = theirs(x)
    ours = load_lora(Toy(), tmp_path / "peft", is_trainable=True)
    assert len(trainable(ours)) == 4
    before = (ours(x) - goal(start)).square().mean()
    train(ours, x, steps=10)
    assert (ours(x) - goal(start)).square().mean() < before
    assert ours.peft_config["default"].initialized is True
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(PeftModel.from_pretrained(Toy(), tmp_path / "ours")(x), ours(x))
    export_lora(ours, tmp_path / "back")
    torch.testing.assert_close(PeftModel.from_pretrained(Toy(), tmp_path / "back")(x), ours(x), rtol=1e-5, atol=1e-5)


def test_beside_an_adapter_that_is_there(tmp_path: Path) -> None:
    theirs, x = stock(tmp_path), inputs()
    model = adapted("lora")
    train(model, x, steps=3)
    y = model(x)
    assert load_lora(model, tmp_path, "second", is_trainable=True) is model
    assert torch.equal(model(x), y)
    model.set_adapter("second")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="has an adapter 'second' already"):
        load_lora(model, tmp_path, "second")


def test_in_half_precision_the_factors_stay_what_they_are(tmp_path: Path) -> None:
    stock(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    first = views(load_lora(Toy(dtype=torch.bfloat16), tmp_path))[0]
    assert first.A.dtype == torch.float32
    assert torch.equal(first.A, saved["base_model.model.first.lora_A.weight"].float())


REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "target_parameters": ["first.weight"],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [3],
    "a_field_of_the_future": {"x": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(name: str, tmp_path: Path) -> None:
    stock(tmp_path)
    edit(tmp_path, **{name: REFUSED[name]})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {name} is "):
        load_lora(Toy(), tmp_path)


def test_starts_that_rewrite_the_base_and_other_methods_are_refused(tmp_path: Path) -> None:
    stock(tmp_path, init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"init_lora_weights is 'pissa'.*path_initial_model_for_weight_conversion"):
        load_lora(Toy(), tmp_path)
    get_peft_model(Toy(), SRLoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path / "sr")
    with pytest.raises(UserError, match="peft_type is ATLAS_SRLORA, not LORA"):
        load_lora(Toy(), tmp_path / "sr")
    with pytest.raises(UserError, match=r"holds no adapter \(adapter_config\.json is missing\)"):
        load_lora(Toy(), tmp_path / "absent")


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.second.lora_A.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.first.lora_magnitude_vector"] = torch.ones(16)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.", "model.encoder.")] = tensors.pop(name)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.first.lora_A.weight"] = torch.zeros(4, 13)


DAMAGES = {
    drop: r"fits this model only in part \(matched 3, missing 1, unexpected 0; the first missing is .*second",
    add: r"only in part \(matched 4, missing 0, unexpected 1; the first unexpected is .*magnitude_vector",
    rename: r"has no tensor that fits this model \(matched 0, missing 4, unexpected 4",
    widen: r"first\.ATLAS_LORA_A.* has shape \(4, 13\).* need \(4, 12\) \(matched 3, missing 0, unexpected 0\)",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_loading_is_strict_and_a_refusal_changes_nothing(damage: Any, tmp_path: Path) -> None:
    stock(tmp_path)
    rewrite(tmp_path, damage)
    net, x = Toy(), inputs()
    net.first.weight.requires_grad_(False)
    y, modules = net(x), [name for name, _ in net.named_modules()]
    with pytest.raises(UserError, match=DAMAGES[damage]):
        load_lora(net, tmp_path)
    assert raw(net(x)) == raw(y)
    assert [name for name, _ in net.named_modules()] == modules
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["first.weight"]
    assert not hasattr(net, "peft_config")


def test_our_own_files_are_counted_too(tmp_path: Path) -> None:
    adapted("lora").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("base_model.model.first.ATLAS_LORA_B"))
    with pytest.raises(UserError, match=r"tensors are missing \(matched 3, missing 1, unexpected 0\).*first"):
        PeftModel.from_pretrained(Toy(), tmp_path)


def test_the_name_is_public() -> None:
    assert loratlas.load_lora is load_lora
    assert "load_lora" in loratlas.__all__
