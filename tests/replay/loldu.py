"""Replays LoLDU's golden vectors: factors and start, three SGD steps on z, the merged weight."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from loratlas import LoLDUConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

# start by the case's letter, as the README gives it
STARTS = {"a": "lu", "b": "uniform", "c": "constant"}


def replay(path: Path) -> None:
    golden = load_file(path)
    weight, r, scaling = golden["W"], golden["z_init"].numel(), float(golden["scaling"])
    start = STARTS[path.stem.split("_")[1]]
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    base[0].weight.data.copy_(weight)
    base[0].bias.data.copy_(golden["bias"])

    def close(name: str, ours: torch.Tensor) -> None:
        torch.testing.assert_close(
            ours.detach(), golden[name], rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}"
        )

    config = LoLDUConfig(r=r, lora_alpha=scaling * r, init_method=start, target_modules=["0"])
    model = get_peft_model(base, config)
    t = next(View(layer, "default") for _, layer in atlas_layers(model))
    close("U_r", t.R)
    torch.testing.assert_close(t.L, golden["P"] @ golden["L_r"], rtol=1e-5, atol=1e-5)
    if start == "uniform":
        with torch.no_grad():  # random: go on from the stored values
            t.z0.copy_(golden["z_init"])
            t.z.copy_(golden["z_init"])
    close("z_init", t.z)
    close("W_res", weight - scaling * (t.L * t.z0) @ t.R)
    close("y_base", base(golden["x"]))
    close("y_init", model(golden["x"]))
    optimizer = torch.optim.SGD([t.z], lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        (model(golden["x"]) * golden["g"]).sum().backward()
        close(f"z_grad_{step}", t.z.grad)
        optimizer.step()
        close(f"z_{step + 1}", t.z)
    close("y_final", model(golden["x"]))
    close("W_merged", t.layer.method.merged(t, weight))
