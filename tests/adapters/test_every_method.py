"""What every adapter of the catalogue must hold, whatever it does: a new row is tested without a line here.

`SMALL` gives options for methods whose defaults do not fit toy layers, `MOVED` names those that start away from the
base's function on purpose, `STEERED` those that train by something else than the gradient of their forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, base_bytes, inputs, train, trainable, views

from loratlas.catalog import baselines, load_entry, systems
from loratlas.engine.config import AtlasConfig
from loratlas.engine.export import export_lora, export_merged
from loratlas.engine.method import View
from loratlas.engine.ops import kind_of, op_for

ADAPTERS = {s.slug: s for s in (*systems(), *baselines()) if s.kind == "adapter" and s.entry.startswith("loratlas.")}
SMALL: dict[str, dict[str, Any]] = {
    "bone": {"r": 2},
    "lora-sb": {"init_lr": 0.01},
    "lora-xs": {"init_std": 0.01},
    "nola": {"num_basis": 24},
    "salt": {"scale_ratio": 0.4},
    "srlora": {"r_target": 12},
    "srlora-gradient": {"r_target": 12},
}
MOVED = {"lora-sb", "lora-xs", "nlora"}
STEERED = {"allora"}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def config(slug: str) -> AtlasConfig:
    system = ADAPTERS[slug]
    options = {"r": 4, "target_modules": list(TARGETS), **system.options, **SMALL.get(slug, {})}
    return load_entry(system)(**options)


def method_of(slug: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return PEFT_TYPE_TO_TUNER_MAPPING[config(slug).peft_type].method


def adapted(slug: str, kind: str = "linear", dtype: torch.dtype = torch.float32) -> PeftModel:
    base = Toy(kind, dtype)
    cfg = calibrated(slug, base)
    torch.manual_seed(1)
    return get_peft_model(base, cfg)


def calibrated(slug: str, base: nn.Module) -> AtlasConfig:
    cfg = config(slug)
    wanted = method_of(slug).gather(cfg)
    cfg.calibration = {path: _statistics(base.get_submodule(path), wanted) for path in TARGETS}
    return cfg


def _statistics(module: nn.Module, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    n_out, n_in = op_for(module, str(kind_of(module, {}))).shape
    made = {
        "gradient": lambda: torch.randn(n_out, n_in, generator=generator),
        "fisher": lambda: torch.rand(n_out, n_in, generator=generator),
        "activation": lambda: (rows := torch.randn(4 * n_in, n_in, generator=generator)).T @ rows / (4 * n_in),
    }
    return {name: made[name]() for name in wanted}


def kinds(slug: str) -> list[str]:
    """Toys whose layers the method can adapt (the embedding's second layer is a linear one)."""
    return [kind for kind in method_of(slug).kinds if kind != "embedding" or "linear" in method_of(slug).kinds]


CASES = [(slug, kind) for slug in ADAPTERS for kind in kinds(slug)]


@pytest.mark.parametrize(("slug", "kind"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_start_training_and_every_way_back(slug: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, x = Toy(kind, dtype), inputs(kind, dtype)
    expected, model = base(x), adapted(slug, kind, dtype)
    start = model(x)
    assert torch.equal(start, expected) == (slug not in MOVED)
    train(model, x, steps=12)
    y = model(x)
    assert not torch.equal(y, start)
    assert base_bytes(model) == {**base_bytes(base), **_saved_modules(model)}
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=_merge_tolerance(dtype), atol=5 * _merge_tolerance(dtype))
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(kind, dtype), tmp_path)
    assert torch.equal(again(x), y)
    assert torch.equal(model.unload()(x), expected)


def _saved_modules(model: nn.Module) -> dict[str, bytes]:
    return {name: value for name, value in base_bytes(model).items() if "modules_to_save" in name}


def _merge_tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("slug", ADAPTERS)
def test_the_fast_forward_is_the_readable_formula(slug: str) -> None:
    model, x = adapted(slug, dtype=torch.float64), inputs(dtype=torch.float64)
    train(model, x, steps=6)
    g = torch.randn(6, 14, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = model(x)
    fast = torch.autograd.grad((y * g).sum(), trainable(model))
    first, second = views(model)
    plain = _dense(second, torch.tanh(_dense(first, x)))
    torch.testing.assert_close(y, plain, rtol=1e-11, atol=1e-11)
    if slug in STEERED:
        return  # what it trains by is held by its own tests
    slow = torch.autograd.grad((plain * g).sum(), trainable(model))
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _dense(t: View, x: Tensor) -> Tensor:
    layer, method = t.layer, t.layer.method
    bias, shift = layer.get_base_layer().bias, method.bias_delta(t)
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return nn.functional.linear(x, method.merged(t, layer.base_matrix()), bias)


@pytest.mark.parametrize(("slug", "kind"), CASES)
def test_exports_reproduce_the_function(slug: str, kind: str, tmp_path: Path) -> None:
    model, x = adapted(slug, kind), inputs(kind)
    train(model, x, steps=12)
    y, forms = model(x), ADAPTERS[slug].exports
    if "lora" in forms:
        report = export_lora(model, tmp_path / "lora")
        assert report.relative_error == 0.0
        stock = PeftModel.from_pretrained(Toy(kind), tmp_path / "lora")
        torch.testing.assert_close(stock(x), y, rtol=1e-5, atol=1e-5)
    if "merged" in forms:
        export_merged(model, tmp_path / "merged")
        from safetensors.torch import load_model

        merged = Toy(kind)
        load_model(merged, tmp_path / "merged" / "model.safetensors")
        torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slug", ADAPTERS)
def test_several_adapters_share_a_base(slug: str) -> None:
    model, x = adapted(slug), inputs()
    train(model, x, steps=6)
    y, other = model(x), calibrated(slug, Toy())
    model.add_adapter("second", other)
    model.set_adapter("second")
    assert torch.equal(model(x), Toy()(x)) == (slug not in MOVED)
    model.set_adapter("default")
    assert torch.equal(model(x), y)
    model.delete_adapter("second")
    assert torch.equal(model(x), y)
