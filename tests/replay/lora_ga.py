"""Replays LoRA-GA's golden vectors: the start up to the signs of singular vectors, three SGD steps, the export."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import LoraGAConfig
from loratlas.engine import pairs
from loratlas.engine.layer import joined_factors
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

# direction and scale by the case's letter, as the README gives them
CASES = {"a": ("ArB2r", "stable"), "b": ("ArBr", "gd"), "c": ("A2rBr", "unit"), "d": ("ArB2r", "weightS")}


def replay(path: Path) -> None:
    golden = load_file(path)
    view, model = _model(golden, *CASES[path.stem.split("_")[1]])
    close("scaling", torch.tensor(view.scaling), golden["scaling"], 1e-6)
    close("|A_init|", view.A.abs(), golden["A_init"].abs(), 2e-4)
    close("|B_init|", view.B.abs(), golden["B_init"].abs(), 2e-4)
    close("A_init^T A_init", view.A.T @ view.A, golden["A_init"].T @ golden["A_init"], 1e-4)
    close("B_init B_init^T", view.B @ view.B.T, golden["B_init"] @ golden["B_init"].T, 1e-4)

    with torch.no_grad():
        pairs.start(view, golden["A_init"], golden["B_init"])
    close("W_init", golden["W"] - view.scaling * view.B0 @ view.A0, golden["W_init"], 1e-5)
    close("y_init", model(golden["x"]), golden["y_init"], 1e-5)
    optimizer = torch.optim.SGD([view.A, view.B], lr=0.01)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        (model(golden["x"]) * golden["g"]).sum().backward()
        optimizer.step()
        close(f"A_{step}", view.A, golden[f"A_{step}"], 1e-5)
        close(f"B_{step}", view.B, golden[f"B_{step}"], 1e-5)
    down, up = joined_factors(view) or ()
    assert up.shape == golden["export_B"].shape
    close("export", up @ down, view.scaling * golden["export_B"] @ golden["export_A"], 1e-5)
    close("W_final", golden["W"] + up @ down, golden["W_final"], 1e-5)


def _model(golden: dict[str, Tensor], direction: str, scale: str) -> tuple[View, nn.Module]:
    weight, r, alpha = golden["W"], int(golden["r"]), float(golden["alpha"])
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    base[0].weight.data.copy_(weight)
    config = LoraGAConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=abs(float(golden["scaling"]) - alpha / r) > 1e-6,
        direction=direction,
        scale=scale,
        stable_gamma=float(golden["gamma"]),
        target_modules=["0"],
    )
    config.calibration = {"0": {"gradient": golden["G"]}}
    model = get_peft_model(base, config)
    return next(View(layer, "default") for _, layer in atlas_layers(model)), model


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
