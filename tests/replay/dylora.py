"""Replays DyLoRA golden trajectories: the ranks that were drawn are given, AdamW moves whole tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from bases import linear
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import DyLoraConfig, attach, set_rank
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    weight, r = golden["W"], int(said["r"])
    base = linear(weight)
    options = {"lora_alpha": float(said["alpha"]), "frozen": said["frozen"].lower() == "true"}
    model = get_peft_model(base, DyLoraConfig(r=r, target_modules=["0"], **options)).train()
    view = next(layer for _, layer in atlas_layers(model)).view("default")
    view.A.data.copy_(golden["A0"])
    view.B.data.copy_(golden["B0"])
    rate, decay = float(said["lr"]), float(said["weight_decay"])
    optimizer = torch.optim.AdamW([view.A, view.B], lr=rate, weight_decay=decay)
    ranks = golden["b_index"].tolist()
    attach(model, optimizer, total_steps=len(ranks))
    for step, index in enumerate(ranks):
        view.drawn.fill_(index + 1)
        y = model(golden[f"s{step}.x"])
        close(f"s{step}.y", y, golden[f"s{step}.y"])
        (y * golden[f"s{step}.g"]).sum().backward()
        close(f"s{step}.gradA", view.A.grad, golden[f"s{step}.gradA"])
        close(f"s{step}.gradB", view.B.grad, golden[f"s{step}.gradB"])
        optimizer.step()
        optimizer.zero_grad()
        close(f"s{step}.A", view.A, golden[f"s{step}.A"])
        close(f"s{step}.B", view.B, golden[f"s{step}.B"])
    model.eval()
    for rank in range(1, r + 1):
        set_rank(model, rank)
        close(f"eval.y_rank{rank}", model(golden["eval.x"]), golden[f"eval.y_rank{rank}"])


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")
