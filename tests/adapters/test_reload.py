"""What users rely on: exact start, untouched base, bit-equal reload, exact export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loratlas import AtlasLoraConfig, LoLDUConfig, LoraGAConfig, SRLoraConfig, SVFitConfig, attach
from loratlas.engine.config import AtlasConfig
from loratlas.engine.export import export_lora
from loratlas.engine.model import atlas_layers

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(20, 30)
        self.second = nn.Linear(30, 24)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def config(name: str, **options: object) -> AtlasConfig:
    targets = ["first", "second"]
    if name == "srlora":
        return SRLoraConfig(r=4, r_target=12, target_modules=targets, **options)
    if name == "lora-ga":
        found = LoraGAConfig(r=4, target_modules=targets, **options)
        gradients = (torch.randn(30, 20), torch.randn(24, 30))
        found.calibration = {path: {"gradient": g} for path, g in zip(targets, gradients, strict=True)}
        return found
    if name in ("svfit", "loldu"):
        return {"svfit": SVFitConfig, "loldu": LoLDUConfig}[name](r=4, target_modules=targets, **options)
    return AtlasLoraConfig(r=4, target_modules=targets, init_weights="pissa" if name == "pissa" else True, **options)


def train(model: nn.Module, x: Tensor, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    attach(model, optimizer, total_steps=steps)
    target = torch.randn(*x.shape[:-1], 24, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    for _ in range(steps):
        (model(x) - target).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("name", ["lora", "pissa", "srlora", "lora-ga", "svfit", "loldu"])
def test_start_disable_reload_and_unload_are_bitwise(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(dtype)
    base, x = copy.deepcopy(net), torch.randn(7, 5, 20).to(dtype)
    model = get_peft_model(net, config(name))
    assert torch.equal(model(x), base(x))
    train(model, x)
    y = model(x)
    assert not torch.allclose(y, base(x))
    for path, layer in atlas_layers(model):
        assert torch.equal(layer.base_layer.weight, base.get_submodule(path.removeprefix("base_model.model.")).weight)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), y)
    assert torch.equal(model.unload()(x), base(x))


@pytest.mark.parametrize("fuse_mode", ["difference", "inplace"])
def test_recomposition_does_not_change_the_function(fuse_mode: str) -> None:
    torch.manual_seed(0)
    net, x = Net(torch.float64), torch.randn(9, 20, dtype=torch.float64)
    model = get_peft_model(net, config("srlora", fuse_mode=fuse_mode))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    attach(model, optimizer, total_steps=20)
    before = model(x).detach()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for _ in range(20):
        model(x).pow(2).mean().backward()
        optimizer.step()
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    for _, layer in atlas_layers(model):
        view = layer.view("default")
        assert int(view.events) == 4
        seen = [*range(4), *view.log[:, 3].tolist()]
        assert sorted(seen) == list(range(12))
    assert parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_no_events_is_pissa() -> None:
    trajectories = []
    for cfg in (config("pissa"), config("srlora", gamma=0.0, lora_alpha=8)):
        torch.manual_seed(0)
        net, x = Net(), torch.randn(9, 20)
        model = get_peft_model(net, cfg)
        train(model, x)
        trajectories.append(model(x))
    assert torch.equal(*trajectories)


@pytest.mark.parametrize(("name", "rank"), [("srlora", 24), ("lora-ga", 8), ("svfit", 4), ("loldu", 4)])
def test_export_is_a_stock_lora(name: str, rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(9, 20)
    base = copy.deepcopy(net)
    model = get_peft_model(net, config(name))
    train(model, x)
    report = export_lora(model, tmp_path / "lora")
    assert report.relative_error == 0.0
    assert report.rank == rank
    stock = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert isinstance(stock.peft_config["default"], LoraConfig)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-6)


def test_lora_starts_and_trains_as_pefts() -> None:
    results = []
    for cfg in (LoraConfig(r=4, target_modules=["first", "second"]), config("lora")):
        torch.manual_seed(0)
        net, x = Net(), torch.randn(9, 20)
        torch.manual_seed(1)
        model = get_peft_model(net, cfg)
        train(model, x)
        results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
