"""FILA's start: nothing changes, the weighted optimum, its relation to PiSSA, and layers without importance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import Toy, inputs, train, view

from loratlas import AtlasLoraConfig, UserError
from loratlas.engine.export import export_lora
from loratlas.engine.method import View

M, N, R = 16, 12, 3


def importance(seed: int = 0) -> Tensor:
    """Relative Fisher information whose rows differ by factors of up to 2,500."""
    noise = torch.rand(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.logspace(-2, 1.4, M, dtype=torch.float64)[:, None]


def started(relative: Tensor, init: str = "fila", **options: Any) -> View:
    """The only layer of a model whose start follows `relative`; scaling 2."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(N, M, bias=False, dtype=torch.float64))
    config = AtlasLoraConfig(r=R, lora_alpha=2 * R, init_weights=init, target_modules=["0"], **options)
    config.calibration = {"0": {"relative_fisher": relative}}
    return view(get_peft_model(base, config), "0")


def test_it_takes_the_best_part_of_the_weight_where_rows_count_by_importance() -> None:
    t, w = started(importance()), importance().sum(1).sqrt()
    weight, part = t.layer.base_matrix(), t.scaling * t.B0 @ t.A0
    tail = torch.linalg.svdvals(w[:, None] * weight)[R:]
    assert float((w[:, None] * (weight - part)).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)
    assert torch.linalg.matrix_rank(part) == R
    assert not t.layer.method.delta_weight(t).any()
    plain = started(importance(), "pissa")
    principal = plain.scaling * plain.B0 @ plain.A0
    assert (w[:, None] * (weight - principal)).norm() > (w[:, None] * (weight - part)).norm() * 1.01


def test_with_equal_rows_it_is_pissa_with_unbalanced_factors() -> None:
    c = 4.0
    t, plain = started(torch.full((M, N), c**2 / N, dtype=torch.float64)), started(importance(), "pissa")
    torch.testing.assert_close(t.A, c**0.5 * plain.A)
    torch.testing.assert_close(t.B, plain.B / c**0.5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_starts_as_it_was_and_ships_exactly(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, x = Toy(kind, dtype), inputs(kind, dtype)
    before = base(x)
    config = AtlasLoraConfig(r=R, init_weights="fila", target_modules=["first"])
    config.calibration = {"first": {"relative_fisher": torch.rand(16, 27 if kind == "conv2d" else 12)}}
    model = get_peft_model(base, config)
    assert torch.equal(model(x), before)
    train(model, x, steps=3)
    report = export_lora(model, tmp_path / "lora")
    assert report.rank <= 2 * R
    after = model(x)
    loaded = PeftModel.from_pretrained(Toy(kind, dtype), tmp_path / "lora")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loaded(x), after, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(after, before)


def test_rows_and_layers_without_importance() -> None:
    relative = importance()
    relative[5] = 0
    t = started(relative)
    assert not t.B[5].any()
    assert torch.isfinite(t.B).all()
    silent = started(torch.zeros(M, N))
    assert silent.A.any()
    assert not silent.B.any()
    with pytest.warns(UserWarning, match="rank"):
        few = started(torch.cat((importance()[:2], torch.zeros(M - 2, N))))
    assert few.r == 2


def test_the_official_svd_depends_on_torchs_generator() -> None:
    exact, codes = started(importance()), [code(seed) for seed in (1, 2)]
    assert not torch.allclose(codes[0], codes[1], atol=1e-6)
    torch.testing.assert_close(codes[0], code(1))
    w = importance().sum(1).sqrt()[:, None]
    weight, best = exact.layer.base_matrix(), exact.scaling * exact.B0 @ exact.A0
    assert all((w * (weight - part)).norm() > (w * (weight - best)).norm() for part in codes)


def code(seed: int) -> Tensor:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(N, M, bias=False, dtype=torch.float64))
    config = AtlasLoraConfig(r=R, lora_alpha=2 * R, init_weights="fila-code", target_modules=["0"])
    config.calibration = {"0": {"relative_fisher": importance()}}
    torch.manual_seed(seed)
    t = view(get_peft_model(base, config), "0")
    return t.scaling * t.B0 @ t.A0


def test_a_start_without_the_data_pass_says_what_to_call() -> None:
    config = AtlasLoraConfig(r=R, init_weights="fila", target_modules=["first"])
    with pytest.raises(UserError, match=r"first: .*relative_fisher\(model, config, forget, retain\) before"):
        get_peft_model(Toy(), config)
    with pytest.raises(UserError, match="True, False, 'pissa', 'fila' or 'fila-code'"):
        AtlasLoraConfig(init_weights="filla")
