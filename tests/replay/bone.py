"""Replays Bone (BAT) and MiSS vectors: the start, four AdamW steps, gradients and the merged weight."""

from __future__ import annotations

from pathlib import Path

import torch
from bases import linear
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import AtlasMissConfig, BoneConfig
from loratlas.engine.config import AtlasConfig
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    base = linear(golden["W"], golden.get("bias"))
    model = get_peft_model(base, config(about))
    t = next(layer for _, layer in atlas_layers(model)).view("default")
    assert torch.equal(t.D, golden["D_init"]), "D_init"
    x = golden["x"].requires_grad_()
    close("y_init", model(x), golden["y_init"])

    optimizer = torch.optim.AdamW([t.D], lr=0.05, weight_decay=0.0)
    step = 0
    while f"traj{step}_D" in golden:
        (model(x) - golden["g"]).square().mean().backward()
        close(f"traj{step}_grad", t.D.grad, golden[f"traj{step}_grad"], 1e-4)
        optimizer.step()
        optimizer.zero_grad()
        close(f"traj{step}_D", t.D, golden[f"traj{step}_D"], 1e-4)
        step += 1
    assert step > 0, "no trajectory"

    with torch.no_grad():
        t.D.copy_(golden["D"])
    y = model(x)
    close("y", y, golden["y"])
    grads = torch.autograd.grad((y * golden["g"]).sum(), (x, t.D))
    close("grad_x", grads[0], golden["grad_x"])
    close("grad_D", grads[1], golden["grad_D"])
    close("W_merged", model.merge_and_unload()[0].weight, golden["W_merged"])


def config(about: dict[str, str]) -> AtlasConfig:
    r, variant = int(about["r"]), about["variant"]
    if variant.startswith("bat"):
        return BoneConfig(r=r, variant=variant, target_modules=["0"])
    return AtlasMissConfig(r=r, mini_r=int(about["mini_r"]) if variant == "miss-mini" else None, target_modules=["0"])


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
