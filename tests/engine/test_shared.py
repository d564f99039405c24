"""Tensors that all layers of an adapter share: one storage, one copy in the file, or a fingerprint that is checked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from toys import TARGETS, Toy, inputs, train, trainable, view, views

from loratlas import RandLoraConfig, UserError
from loratlas.engine.distributed import whole_state_dict
from loratlas.linalg.seeded import Stream


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    model = get_peft_model(Toy(dtype=dtype), config(**options))
    change(model)
    return model


def config(**options: Any) -> RandLoraConfig:
    return RandLoraConfig(**{"r": 3, "target_modules": list(TARGETS), **options})


def change(model: torch.nn.Module) -> None:
    for p in trainable(model):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def pointers(model: torch.nn.Module, adapter: str = "default") -> set[int]:
    return {t.B.data_ptr() for t in views(model, adapter)}


def test_layers_of_all_shapes_share_one_storage_wherever_the_model_goes() -> None:
    model, x = adapted(), inputs()
    y = model(x)
    assert len(pointers(model)) == 1
    twin = copy.deepcopy(model)
    assert len(pointers(twin)) == 1
    assert pointers(twin) != pointers(model)
    assert torch.equal(twin(x), y)
    model.add_adapter("second", config())
    model.to(torch.float64)
    assert len(pointers(model) | pointers(model, "second")) == 1
    assert view(model).B.dtype == torch.float64
    injected = inject_adapter_in_model(config(), Toy())
    assert len(pointers(injected)) == 1


def test_the_file_holds_them_once_and_a_reload_needs_no_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(), inputs()
    model.save_pretrained(tmp_path)
    tensors = saved(tmp_path)
    assert sorted(name.rpartition("_")[2] for name in tensors) == ["A", "B", "gam", "gam", "lam", "lam"]
    shards = tmp_path / "gathered"
    model.save_pretrained(shards, state_dict=whole_state_dict(model))
    assert all(torch.equal(value, saved(shards)[name]) for name, value in tensors.items())
    elsewhere(monkeypatch)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(Toy(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(again(x), model(x))
        assert len(pointers(again)) == 1


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose generator gives other numbers."""
    drawn = Stream._drawn
    monkeypatch.setattr(Stream, "_drawn", lambda *arguments: drawn(*arguments).flip(0))


def test_drawn_again_they_leave_the_file_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(save_bases=False), inputs()
    model.save_pretrained(tmp_path)
    assert sum(value.numel() for value in saved(tmp_path).values()) == 16 + sum(p.numel() for p in trainable(model))
    shards = tmp_path / "gathered"
    model.save_pretrained(shards, state_dict=whole_state_dict(model))
    assert saved(shards).keys() == saved(tmp_path).keys()
    torch.manual_seed(77)
    again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert torch.equal(again(x), model(x))
    elsewhere(monkeypatch)
    with pytest.raises(
        UserError, match=r"shared tensor A is drawn from a seed, and here other numbers .* save it there"
    ):
        PeftModel.from_pretrained(Toy(), tmp_path)


def test_a_file_without_them_or_with_others_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    file, tensors = tmp_path / "adapter_model.safetensors", saved(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, "tensors_sha256": None}))
    save_file({name: value for name, value in tensors.items() if not name.endswith("_B")}, file)
    with pytest.raises(UserError, match=r"shared tensor B and its fingerprint are missing"):
        PeftModel.from_pretrained(Toy(), tmp_path)
    save_file({n: value[:-1].clone() if n.endswith("_B") else value for n, value in tensors.items()}, file)
    with pytest.raises(UserError, match=r"shared tensor B has shape \(15, 6, 3\), but .* need \(16, 6, 3\)"):
        PeftModel.from_pretrained(Toy(), tmp_path)


def test_adapters_with_other_bases_do_not_touch_each_other(tmp_path: Path) -> None:
    model, x = adapted(), inputs()
    y = model(x)
    other = adapted(seed=5)
    other.save_pretrained(tmp_path / "other")
    # as trained where the same seed gives other numbers: the file's bases are not what this machine draws
    text = (tmp_path / "other" / "adapter_config.json").read_text()
    (tmp_path / "other" / "adapter_config.json").write_text(text.replace('"seed": 5', '"seed": 0'))
    model.load_adapter(tmp_path / "other", "second")
    assert torch.equal(model(x), y)
    model.set_adapter("second")
    assert torch.equal(model(x), other(x))
    model.add_adapter("narrow", config(target_modules=["second"], r=2))
    model.set_adapter("default")
    assert torch.equal(model(x), y)
    for name in ("second", "narrow"):
        model.delete_adapter(name)
    model.base_model.rename_adapter("default", "renamed")
    model.set_adapter("renamed")
    assert torch.equal(model(x), y)
    assert list(view(model, adapter="renamed").layer.store("A")) == ["renamed"]
    assert torch.equal(model.merge_and_unload()(x).detach(), adapted().merge_and_unload()(x))


def test_a_whole_models_state_brings_each_adapter_its_own() -> None:
    model, x = adapted(), inputs()
    model.add_adapter("second", config())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [name for name in state if name.endswith("RANDLORA_B.second")]:
        state[name] = -state[name]
    y = model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    assert torch.equal(view(model, adapter="second").B, -view(model).B)


def test_training_leaves_them_alone() -> None:
    model = adapted()
    before = view(model).B.clone()
    train(model, inputs(), steps=3)
    assert torch.equal(view(model).B, before)
    assert not view(model).B.requires_grad
