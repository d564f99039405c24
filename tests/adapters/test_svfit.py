"""SVFit: what its equations promise, the rank rule, and files without bases."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import Toy, distance, inputs, trainable, view, views

from loratlas import AtlasLoraConfig, SVFitConfig, UserError
from loratlas.adapters.svfit import energy_rank

R = 5


def adapted(r: int | None = R, dtype: torch.dtype = torch.float64, kind: str = "linear", **options: Any) -> PeftModel:
    return get_peft_model(Toy(kind, dtype), SVFitConfig(r=r, target_modules=["first", "second"], **options))


def change(model: nn.Module, seed: int = 3) -> None:
    for p in trainable(model):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


def test_r_singular_values_train_between_orthonormal_bases() -> None:
    model = adapted()
    assert [p.numel() for p in trainable(model)] == [R, R]
    change(model)
    for t in views(model):
        eye = torch.eye(R, dtype=torch.float64)
        torch.testing.assert_close(t.L.T @ t.L, eye)
        torch.testing.assert_close(t.R @ t.R.T, eye)
        weight, method = t.layer.base_matrix(), t.layer.method
        torch.testing.assert_close(t.S, torch.linalg.svdvals(weight)[:R])
        residual = weight - (t.L * t.S) @ t.R
        torch.testing.assert_close(method.merged(t, weight), residual + (t.L * method.sigma(t)) @ t.R)


def test_a_value_of_zero_removes_its_component_and_a_common_factor_scales_w() -> None:
    t = view(adapted())
    t.shift.data[2] = -t.S[2]
    torch.testing.assert_close(t.layer.method.delta_weight(t).norm(), t.S[2])
    t = view(adapted(r=12, relative=True))
    t.shift.data.fill_(1.5)
    weight = t.layer.base_matrix()
    torch.testing.assert_close(t.layer.method.merged(t, weight), 2.5 * weight)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_the_gradient_is_u_g_v(kind: str) -> None:
    model, x = adapted(kind=kind), inputs(kind, torch.float64)
    change(model)
    model(x).square().sum().backward()
    t = view(model, "second")
    merged = model.merge_and_unload()
    merged.second.weight.requires_grad_(True)
    merged(x).square().sum().backward()
    gradient = t.op.canonical(merged.second.weight.grad)
    torch.testing.assert_close(t.shift.grad, torch.einsum("oi,on,in->i", t.L, gradient, t.R))


def test_energy_rank() -> None:
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert [energy_rank(s, share, "squared") for share in (0.5, 0.9, 0.93, 1.0)] == [1, 2, 3, 3]
    assert [energy_rank(s, share, "nuclear") for share in (0.5, 0.8, 0.9, 1.0)] == [1, 2, 3, 3]
    assert energy_rank(torch.zeros(4), 0.99, "squared") == 1


def test_an_open_rank_follows_each_spectrum_and_is_saved(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted(None, energy=0.8)
    ranks = {name: t.r for name, t in zip(("first", "second"), views(model), strict=True)}
    for name, t in zip(ranks, views(model), strict=True):
        share = torch.linalg.svdvals(t.layer.base_matrix()).square()
        assert share[: t.r].sum() >= 0.8 * share.sum() > share[: t.r - 1].sum(), name
    assert 1 < ranks["first"] < 12
    change(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(dtype=torch.float64), tmp_path)
    assert torch.equal(again(inputs(dtype=torch.float64)), model(inputs(dtype=torch.float64)))
    fixed = adapted(None, energy=0.8, rank_pattern={"first": 3})
    assert view(fixed).r == 3


def test_a_rank_beyond_the_layer_is_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"rank 768 exceeds the 12 useful directions of first"):
        model = adapted(768)
    assert [t.r for t in views(model)] == [12, 14]


# ------------------------------------------------------------------------------------------- files without bases


def saved(folder: Path) -> PeftModel:
    model = adapted(dtype=torch.float32, save_bases=False)
    change(model)
    model.save_pretrained(folder)
    return model


def test_without_bases_the_file_is_small_and_exact(tmp_path: Path) -> None:
    model, whole = saved(tmp_path / "small"), adapted(dtype=torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < sizes[1] / 2
    x = inputs()
    again = PeftModel.from_pretrained(Toy(), tmp_path / "small")
    assert torch.equal(again(x), model(x))
    change(whole)
    assert torch.equal(whole(x), model(x))
    again.set_adapter("default")
    again.load_adapter(tmp_path / "small", "second")
    again.set_adapter("second")
    assert torch.equal(again(x), model(x))


def test_without_bases_another_w_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Toy()
    other.second.weight.data[0, 0] += 1e-3
    with pytest.raises(UserError, match=r"module second: .*save_bases=False on another base weight"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(UserError, match="same dtype"):
        PeftModel.from_pretrained(Toy(dtype=torch.bfloat16), tmp_path)


def test_without_bases_another_factorisation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratlas.adapters import svfit

    saved(tmp_path)
    exact = svfit.top_svd

    def elsewhere(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = exact(*arguments, **options)
        mixed = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0))).Q
        u[:, :2], vh[:2] = u[:, :2] @ mixed, mixed.T @ vh[:2]  # as if the first two singular values were equal
        return u, s, vh

    monkeypatch.setattr(svfit, "top_svd", elsewhere)
    with pytest.raises(UserError, match=r"module first: W factorises differently .* save_bases=True"):
        PeftModel.from_pretrained(Toy(), tmp_path)

    def flipped(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = exact(*arguments, **options)
        return -u, s, -vh

    monkeypatch.setattr(svfit, "top_svd", flipped)  # signs are open and harmless
    PeftModel.from_pretrained(Toy(), tmp_path)


# ------------------------------------------------------------------------------------------------- what it can fit


def test_it_fits_spectra_that_lora_cannot_and_not_the_other_way_round() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16, dtype=torch.float64) / 4
    u, s, vh = torch.linalg.svd(weight)
    spectrum = (u * (s * (1.0 + 0.5 * torch.randn(16, dtype=torch.float64)))) @ vh
    shift = weight + torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64) / 8
    svfit, lora = SVFitConfig(r=16, target_modules=["0"]), AtlasLoraConfig(r=1, target_modules=["0"])
    assert distance(400, svfit, spectrum, weight) < 1e-3
    assert distance(400, lora, spectrum, weight) > 0.3
    assert distance(400, SVFitConfig(r=16, target_modules=["0"]), shift, weight) > 0.8
    assert distance(400, AtlasLoraConfig(r=2, target_modules=["0"]), shift, weight) < 1e-3


def test_bad_options_name_the_field() -> None:
    for options, match in (
        ({"energy": 0.0}, "energy must be in"),
        ({"energy_norm": "entropy"}, "energy_norm must be"),
        ({"r": 0}, "r must be an integer of at least 1"),
        ({"svd_method": "fast"}, "svd_method must be"),
    ):
        with pytest.raises(UserError, match=match):
            SVFitConfig(**options)
    with pytest.raises(UserError, match="r must be an integer"):
        AtlasLoraConfig(r=None)
