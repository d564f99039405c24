"""WaRA beyond the golden vectors: what its update is, and its further options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from toys import TARGETS, Toy, inputs, train, trainable, view

from loratlas import UserError, WaRAConfig
from loratlas.engine.export import export_lora
from loratlas.linalg.wavelets import filters, join, split


def wara(**options: object) -> PeftModel:
    options = {"r": 2, "target_modules": list(TARGETS), **options}
    model = get_peft_model(Toy(dtype=torch.float64), WaRAConfig(**options))
    train(model, inputs(dtype=torch.float64))
    return model


def test_haar_is_a_kronecker_product_with_half_of_loras_parameters() -> None:
    model = wara()
    assert sum(p.numel() for p in trainable(model)) == 2 * (12 + 16 + 16 + 14) // 2
    t = view(model)
    delta = t.layer.method.delta_weight(t)
    torch.testing.assert_close(delta, torch.kron(t.B @ t.A, torch.eye(2, dtype=torch.float64)))
    assert torch.linalg.matrix_rank(delta) == 4


@pytest.mark.parametrize("shared", [True, False])
def test_longer_filters_are_the_split_map_join_pipeline(shared: bool) -> None:
    model, x = wara(wavelet="db2", shared_bands=shared), torch.randn(3, 5, 12, dtype=torch.float64)
    t, wavelet = view(model), filters("db2")
    maps = [t.B @ t.A, t.B @ t.A if shared else t.B_high @ t.A_high]
    expected = join(*(band @ core.T for band, core in zip(split(x, wavelet), maps, strict=True)), wavelet)
    torch.testing.assert_close(t.layer.method.delta(t, x), expected)
    delta = t.layer.method.delta_weight(t)
    assert torch.linalg.matrix_rank(delta) == 4
    kron = torch.kron(maps[0], torch.eye(2, dtype=torch.float64))
    assert not torch.allclose(delta, kron, atol=1e-3 * float(kron.abs().max()))


def test_own_bands_have_twice_the_parameters() -> None:
    assert sum(p.numel() for p in trainable(wara(shared_bands=False))) == 2 * (12 + 16 + 16 + 14)


@pytest.mark.parametrize("options", [{"wavelet": "db2"}, {"shared_bands": False, "lora_alpha": 4}])
def test_it_exports_as_a_lora_of_twice_the_rank(options: dict[str, object], tmp_path: Path) -> None:
    model, x = wara(**options), inputs(dtype=torch.float64)
    report = export_lora(model, tmp_path / "lora", dtype=torch.float64)
    assert (report.rank, report.relative_error) == (4, 0.0)
    stock = PeftModel.from_pretrained(Toy(dtype=torch.float64), tmp_path / "lora", autocast_adapter_dtype=False)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-6, atol=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match=r"^module 0: its 3 x 4 weight has an odd side.*out of target_modules"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), WaRAConfig(target_modules=["0"]))
    with pytest.raises(UserError, match=r"^WaRAConfig: wavelet: ") as caught:
        WaRAConfig(wavelet="morlet")
    assert caught.value.field == "wavelet"
