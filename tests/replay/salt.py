"""Replays SALT trajectories of the official layer: outputs, regulariser, gradients, four SGD steps, core and weight."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import SaltConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

NAMES = {"scale": "scale_A", "shift": "shift_B", "X": "X", "Y": "Y"}


def replay(path: Path) -> None:
    golden = load_file(path)
    model, t = _model(golden)
    weight = float(golden.get("reg_multiplier", torch.tensor(0.0)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    method = t.layer.method
    close("y_init", model(golden["x"]), golden["y_init"])
    for k in range(4):
        y, reg = model(golden["x"]), method.distance(t)
        close(f"y_{k}", y, golden[f"y_{k}"])
        close(f"reg_{k}", reg, golden[f"reg_{k}"])
        ((y * golden["g"]).sum() + weight * reg).backward()
        for ours, theirs in NAMES.items():
            close(f"grad_{theirs}_{k}", getattr(t, ours).grad, golden[f"grad_{theirs}_{k}"])
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in NAMES.items():
            close(f"{theirs}_{k + 1}", getattr(t, ours), golden[f"{theirs}_{k + 1}"])
    close("y_final", model(golden["x"]), golden["y_final"])
    core = t.U.T @ (golden["W"] + method.delta_weight(t)) @ t.V.T
    close("core_final", core, golden["core_final"])
    close("W_merged", golden["W"] + method.delta_weight(t), golden["W_merged"])


def _model(golden: dict[str, Tensor]) -> tuple[nn.Module, View]:
    """One layer whose adapter has the file's own singular vectors and start."""
    w = golden["W"]
    base = nn.Sequential(nn.Linear(w.shape[1], w.shape[0]))
    base[0].weight.data.copy_(w)
    base[0].bias.data.copy_(golden["bias"])
    k, q = len(golden["scale_init"]), golden["X_init"].shape[1]
    model = get_peft_model(base, SaltConfig(r=q, scale_rank=k, target_modules=["0"]))
    t = View(next(layer for _, layer in atlas_layers(model)), "default")
    values = {"U": "U", "S": "S", "V": "Vt", "scale": "scale_init", "shift": "shift_init", "X": "X_init", "Y": "Y_init"}
    with torch.no_grad():
        for ours, theirs in values.items():
            getattr(t, ours).copy_(golden[theirs])
    return model, t


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """1e-5, and 2e-5 on what the four steps lead to, as the vectors' README says."""
    tolerance = 2e-5 if name.endswith(("final", "merged")) else 1e-5
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
