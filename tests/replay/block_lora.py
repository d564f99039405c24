"""Replays Block-LoRA vectors: output, gradients and update, with n tensors B_i and with one for all."""

from __future__ import annotations

from pathlib import Path

import torch
from bases import linear
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import BlockLoraConfig
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    for efficient in (False, True):
        base = linear(golden["W"], golden["bias"])
        r, n = int(about["r"]), int(about["n"])
        config = BlockLoraConfig(r=r, n_blocks=n, efficient=efficient, target_modules=["0"])
        model = get_peft_model(base, config)
        t = next(layer for _, layer in atlas_layers(model)).view("default")
        arms = golden["B_blocks"]
        with torch.no_grad():
            t.A.copy_(golden["A_s"])
            t.B.copy_(arms.mean(0) if efficient else arms)
        y = model(golden["x"])
        close("y", y, golden["y"])
        close("delta", t.layer.method.delta_weight(t), golden["delta"])
        of_a, of_b = torch.autograd.grad((y * golden["g"]).sum(), (t.A, t.B))
        close("grad_A_s", of_a, golden["grad_A_s"])
        close("grad_B_blocks", of_b, golden["grad_B_blocks"][0] if efficient else golden["grad_B_blocks"])


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")
