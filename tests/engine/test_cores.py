"""What every method with a three-factor core keeps: its start, its gradients, an untouched base, reload and export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from toys import TARGETS, Toy, base_bytes, inputs, train, trainable, view

from loratlas import LamdaConfig, LoraSBConfig, LoraXSConfig, NLoraConfig, UserError
from loratlas.engine.config import AtlasConfig
from loratlas.engine.export import export_lora

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MAKERS = {
    "nlora": lambda **o: NLoraConfig(**o),
    "nlora-residual": lambda **o: NLoraConfig(residual=True, **o),
    "nystrom": lambda **o: NLoraConfig(init_weights="pinv", **o),
    "slora": lambda **o: NLoraConfig(init_weights="slora", **o),
    "inttune": lambda **o: NLoraConfig(train="core", **o),
    "inttune-residual": lambda **o: NLoraConfig(train="core", residual=True, **o),
    "lora-xs": lambda **o: LoraXSConfig(init_std=0.01, **o),
    "lora-xs-exact": lambda **o: LoraXSConfig(init_std=0.0, **o),
    "lora-sb": lambda **o: LoraSBConfig(init_lr=0.01, **o),
    "lamda": lambda **o: LamdaConfig(**o),
    "lamda-code": lambda **o: LamdaConfig(init_weights="code", **o),
}
# the start that the paper wants is not the base model's function
MOVED = {"nlora", "inttune", "lora-xs", "lora-sb"}


def config(name: str, **options: object) -> AtlasConfig:
    made: AtlasConfig = MAKERS[name](**{"r": 4, "lora_alpha": 2, "target_modules": list(TARGETS), **options})
    if name == "lora-sb":
        made.calibration = {
            path: {"gradient": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
            for path, shape in (("first", (16, 12)), ("second", (14, 16)))
        }
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_start_base_reload_and_merge_are_bitwise(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, x = Toy(dtype=dtype), inputs(dtype=dtype)
    model = get_peft_model(copy.deepcopy(base), config(name))
    assert isinstance(model, PeftModel)
    assert torch.equal(model(x), base(x)) == (name not in MOVED)
    train(model, x, 6)
    y = model(x)
    assert not torch.equal(y, base(x))
    assert base_bytes(model) == base_bytes(base)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **({"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}))
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), y)
    assert torch.equal(model.unload()(x), base(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "lora-sb"])
def test_gradients_are_those_of_s_b_n_a(name: str, kind: str) -> None:
    model = get_peft_model(Toy(kind, torch.float64), config(name))
    x = inputs(kind, torch.float64)
    train(model, x, 3, total=100)  # away from the start, before LaMDA freezes anything
    model(x).square().sum().backward()
    t = view(model)
    layer = copy.deepcopy(t.layer.get_base_layer()).requires_grad_(True)
    weight = t.op.canonical(layer.weight.detach())
    with torch.no_grad():
        layer.weight.copy_(t.op.stored(weight + t.layer.method.delta_weight(t), layer.weight))
    second = get_peft_model(Toy(kind, torch.float64), config(name))
    second.load_state_dict(model.state_dict())
    second.base_model.model.first = layer
    second(x).square().sum().backward()
    dense = t.op.canonical(layer.weight.grad)
    a, n, b = (getattr(t, factor).detach() for factor in ("A", "N", "B"))
    expected = {"A": (b @ n).T @ dense, "N": b.T @ dense @ a.T, "B": dense @ (n @ a).T}
    moving = [factor for factor in "ANB" if getattr(t, factor).requires_grad]
    assert "N" in moving
    for factor in moving:
        torch.testing.assert_close(getattr(t, factor).grad, t.scaling * expected[factor], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_export_is_a_stock_lora_of_the_promised_rank(name: str, tmp_path: Path) -> None:
    base, x = Toy(), inputs()
    model = get_peft_model(copy.deepcopy(base), config(name))
    train(model, x, 6)
    report = export_lora(model, tmp_path / "lora")
    assert report.relative_error == 0.0
    assert view(model).layer.method.factors(view(model)).down.shape[0] == (
        8 if name in ("nlora-residual", "nystrom") else 4
    )
    stock = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert isinstance(stock.peft_config["default"], LoraConfig)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["inttune", "lora-xs", "lora-sb", "lamda"])
def test_a_fixed_down_projection_spares_the_input(name: str) -> None:
    model, x = get_peft_model(Toy(), config(name)), inputs(ndim=3)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.shape.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model.model.first(x)
    assert x.numel() not in sizes
    assert x.numel() // 12 * 4 in sizes  # x A^T


def test_what_a_config_fixes_stays_fixed() -> None:
    model = get_peft_model(Toy(), config("inttune"))
    model.add_adapter("all", config("nlora"))

    def moving(adapter: str) -> str:
        return "".join(name for name in "ANB" if getattr(view(model, adapter=adapter), name).requires_grad)

    assert [moving("default"), moving("all")] == ["N", ""]
    model.set_adapter("all")
    assert [moving("default"), moving("all")] == ["", "ANB"]
    model.set_adapter("default")
    model.set_requires_grad("default")
    with model.disable_adapter():
        assert moving("default") == ""
    assert moving("default") == "N"
    model.base_model.rename_adapter("default", "core")
    model.set_adapter("all")
    model.set_adapter("core")
    assert moving("core") == "N"
    before = {name: getattr(view(model, adapter="core"), name).clone() for name in "AB"}
    train(model, inputs(), 5)
    assert all(torch.equal(getattr(view(model, adapter="core"), name), value) for name, value in before.items())
    assert sum(p.numel() for p in trainable(model)) == 2 * 4 * 4
    with pytest.warns(UserWarning, match="Setting active adapter to all"):
        model.delete_adapter("core")
    assert moving("all") == "ANB"


def test_ranks_above_the_layer_are_cut_with_a_warning() -> None:
    for name in ("nlora", "nystrom", "lora-xs", "lora-sb", "lamda"):
        with pytest.warns(UserWarning, match="rank 13 exceeds the 12 useful directions of first"):
            model = get_peft_model(Toy(), config(name, r=13))
        assert view(model).N.shape == (12, 12)
        assert view(model, "second").N.shape == (13, 13)


@pytest.mark.parametrize("name", ["nlora-residual", "lora-xs", "lamda"])
def test_autocast_leaves_the_factors_alone_and_a_cast_parameter_is_refused(name: str) -> None:
    model = get_peft_model(Toy(), config(name))
    train(model, inputs(), 3, total=100)
    t = view(model)
    before = t.layer.method.factors(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(t.layer.method.factors(t).up, before.up)
    t.N.data = t.N.data.bfloat16()  # as FSDP2's MixedPrecisionPolicy does
    with pytest.raises(UserError, match=r"leave MixedPrecisionPolicy.param_dtype unset"):
        model(inputs())
