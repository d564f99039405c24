"""Replays SVFit's reference vectors (float64): the factorisation, four AdamW steps on sigma, merging, the export."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from loratlas import SVFitConfig
from loratlas.engine.layer import joined_factors
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

# by the letter of the case, as the README gives them
RATES = {"a": 0.05, "b": 0.02}


def replay(path: Path) -> None:
    golden = load_file(path)
    weight, r = golden["W"], golden["sigma_init"].numel()
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
    base[0].weight.data.copy_(weight)
    base[0].bias.data.copy_(golden["bias"])

    def close(name: str, ours: torch.Tensor) -> None:
        torch.testing.assert_close(
            ours.detach(), golden[name], rtol=1e-8, atol=1e-8, msg=lambda text: f"{name}: {text}"
        )

    model = get_peft_model(base, SVFitConfig(r=r, target_modules=["0"]))
    t = next(View(layer, "default") for _, layer in atlas_layers(model))
    method = t.layer.method
    close("sigma_init", t.S)
    close("W_e", weight - (t.L * t.S) @ t.R)
    close("y_base", base(golden["x"]))
    close("y_init", model(golden["x"]))

    with torch.no_grad():  # the signs of singular vectors are open
        t.L.copy_(golden["U_r"])
        t.R.copy_(golden["Vh_r"])
    optimizer = torch.optim.AdamW([t.shift], lr=RATES[path.stem.split("_")[1]], weight_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        (model(golden["x"]) * golden["g"]).sum().backward()
        close(f"grad_sigma_{step}", t.shift.grad)
        optimizer.step()
        close(f"sigma_{step + 1}", method.sigma(t))
    close("y_final", model(golden["x"]))
    close("W_merged", method.merged(t, weight))
    down, up = joined_factors(t) or ()
    assert up.shape == golden["export_B"].shape
    torch.testing.assert_close(up @ down, golden["export_B"] @ golden["export_A"], rtol=1e-8, atol=1e-8)
