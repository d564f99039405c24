"""Replays ALLoRA golden trajectories, which were computed from the equations in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from bases import linear
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import ALLoraConfig
from loratlas.adapters.allora import coefficients
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    weight, eta = golden["W"], float(said["eta"])
    base = linear(weight)
    model = get_peft_model(base, ALLoraConfig(r=int(said["r"]), eta=eta, target_modules=["0"]))
    view = next(layer for _, layer in atlas_layers(model)).view("default")
    view.A.data.copy_(golden["A0"])
    view.B.data.copy_(golden["B0"])
    optimizer = torch.optim.AdamW([view.A, view.B], lr=float(said["lr"]), weight_decay=0.0)
    for step in range(sum(name.endswith(".x") for name in golden)):
        x = golden[f"s{step}.x"].requires_grad_()
        y = model(x)
        close(f"s{step}.y", y, golden[f"s{step}.y"])
        close(f"s{step}.coef", coefficients(view.A, view.B, eta), golden[f"s{step}.coef"])
        y.backward(golden[f"s{step}.g"])
        close(f"s{step}.gradA", view.A.grad, golden[f"s{step}.gradA"])
        close(f"s{step}.gradB", view.B.grad, golden[f"s{step}.gradB"])
        close(f"s{step}.gradx", x.grad, golden[f"s{step}.gradx"])
        optimizer.step()
        optimizer.zero_grad()
        close(f"s{step}.A", view.A, golden[f"s{step}.A"])
        close(f"s{step}.B", view.B, golden[f"s{step}.B"])


def close(name: str, ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None, name
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")
