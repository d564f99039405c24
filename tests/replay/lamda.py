"""Replays LaMDA golden trajectories: the official start and its freezing schedule, by SGD."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import LamdaConfig, attach
from loratlas.engine.model import atlas_layers

LR = 0.1  # what the README gives for all files


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    weight, r = golden["W"], golden["S_init"].shape[0]
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
    base[0].weight.data.copy_(weight)
    base[0].bias.data.copy_(golden["bias"])
    fraction = float(f"{float(golden['eta']):.6g}")  # stored in float32, whose neighbour would move the schedule
    model = get_peft_model(
        base,
        LamdaConfig(
            r=r,
            lora_alpha=float(golden["scaling"]) * r,
            init_weights="code",
            freeze_schedule="code",
            freeze_fraction=fraction,
            target_modules=["0"],
        ),
    )
    view = next(layer for _, layer in atlas_layers(model)).view("default")
    for factor, value in ((view.A, golden["A"]), (view.N, golden["S_init"]), (view.B, golden["B_init"])):
        factor.data.copy_(value)
    close("y_init", model(golden["x"]), golden["y_init"])

    steps, parts = int(golden["max_steps"]), int(golden["grad_acc"])
    optimizer = torch.optim.SGD([view.N, view.B], lr=LR)
    attach(model, optimizer, total_steps=steps)
    seen: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(_gradients(view.B, view.N)))  # as the optimizer sees them
    for step in range(steps):
        for _ in range(parts):
            ((model(golden["x"]) - golden["target"]).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        close(f"gradB_{step}", seen["B"], golden[f"gradB_{step}"])
        close(f"gradS_{step}", seen["N"], golden[f"gradS_{step}"])
        assert view.B.requires_grad == bool(golden[f"B_requires_grad_{step}"]), f"B_requires_grad_{step}"
        close(f"B_{step + 1}", view.B, golden[f"B_{step + 1}"])
        close(f"S_{step + 1}", view.N, golden[f"S_{step + 1}"])
    assert torch.equal(view.A, golden["A"]), "A"
    close("y_final", model(golden["x"]), golden["y_final"])


def _gradients(up: Tensor, core: Tensor) -> dict[str, Tensor]:
    grads = {"B": (up, up.grad), "N": (core, core.grad)}
    return {name: torch.zeros_like(p) if grad is None else grad.clone() for name, (p, grad) in grads.items()}


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
