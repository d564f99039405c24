"""Replays LoRA-Pro golden trajectories of the official full mode: gradients, adjustment, moments and factors."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas.optim.lora_pro import LoraPro


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    weight, (r, _) = golden["W"], golden["A.init"].shape
    counter, lr, s = (float(golden[f"scalar.{name}"]) for name in ("first_global_step", "lr", "s"))
    # the official run accumulates squares of gradients rounded to bf16; ours rounds nothing
    rounded = bool(counter) and not bool(golden["B.init"].any())
    tolerance = 2e-3 if rounded else 1e-5

    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    base[0].weight.data.copy_(weight)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=s * r, target_modules=["0"]))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data.copy_(golden["A.init"])
    b.data.copy_(golden["B.init"])
    optimizer = LoraPro(model, lr, weight_decay=float(golden["scalar.weight_decay"]), mode="full")
    # the official counter is one ahead where it says so, which moves Adam's bias correction alone
    moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[a] = {"step": torch.tensor(counter), **moments}

    for step in range(sum(name.startswith("loss.") for name in golden)):
        loss = (model(golden["x"]) - golden["y"]).square().mean() * weight.shape[0] / 2
        loss.backward()
        close(f"loss.{step}", loss, golden[f"loss.{step}"], tolerance)
        close(f"gA.{step}", a.grad, golden[f"gA.{step}"], tolerance)
        close(f"gB.{step}", b.grad, golden[f"gB.{step}"], tolerance)
        before = [p.detach().clone() for p in (a, b)]
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state[a]
        for p, old, name in zip((a, b), before, "AB", strict=True):
            close(f"{name}.{step}", p, golden[f"{name}.{step}"], tolerance)
            close(f"adj{name}.{step}", (old - p) / lr, golden[f"adj{name}.{step}"], tolerance, lr)
        close(f"m.{step}", state["exp_avg"], golden[f"m.{step}"], tolerance)
        close(f"v.{step}", state["exp_avg_sq"], golden[f"v.{step}"], 5e-3 if rounded else tolerance)


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float, unit: float = 1.0) -> None:
    """Relative distance of the whole tensor; unit: the step size through which a difference was taken."""
    gap, size = (ours.detach() - theirs).norm(), theirs.norm()
    assert gap <= tolerance * size + 1e-7 / unit, f"{name}: off by {float(gap):.2e} of {float(size):.2e}"
