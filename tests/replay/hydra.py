"""Replays Hydra vectors: the official start, AdamW steps, gradients, and the merged weight and bias."""

from __future__ import annotations

from pathlib import Path

import torch
from bases import linear
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import HydraConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    base = linear(golden["W"], golden.get("bias"))
    biased = "init_par_a" in golden
    config = HydraConfig(
        r_parallel=golden["par_A"].shape[0],
        r_sequential=golden["seq_A"].shape[0],
        scaling=float(about["scale"]),
        branch_bias=biased,
        target_modules=["0"],
    )
    model = get_peft_model(base, config)
    t = next(layer for _, layer in atlas_layers(model)).view("default")
    names = {f"{end}_{kind}": f"{kind}_{end}" for end in ("par", "seq") for kind in ("ABab" if biased else "AB")}
    put(t, {ours: golden[f"init_{theirs}"] for theirs, ours in names.items()})
    x = golden["x"].requires_grad_()
    close("y_init", model(x), golden["y_init"])

    optimizer = torch.optim.AdamW([getattr(t, ours) for ours in names.values()], lr=0.02, weight_decay=1e-4)
    steps = int(about.get("steps", 5))
    for step in range(steps):
        (model(x) - golden["g"]).square().mean().backward()
        for theirs, ours in names.items():
            close(f"traj{step}_grad_{theirs}", getattr(t, ours).grad, golden[f"traj{step}_grad_{theirs}"], 1e-4)
        optimizer.step()
        optimizer.zero_grad()
        for theirs, ours in names.items():
            close(f"traj{step}_{theirs}", getattr(t, ours), golden[f"traj{step}_{theirs}"], 1e-4)

    put(t, {ours: golden[theirs] for theirs, ours in names.items()})
    y = model(x)
    close("y", y, golden["y"])
    grads = torch.autograd.grad((y * golden["g"]).sum(), [x, *(getattr(t, ours) for ours in names.values())])
    for name, grad in zip(("x", *names), grads, strict=True):
        close(f"grad_{name}", grad, golden[f"grad_{name}"])
    merged = model.merge_and_unload()[0]
    close("W_merged", merged.weight, golden["W_merged"])
    if "bias_merged" in golden:
        close("bias_merged", merged.bias, golden["bias_merged"])


def put(t: View, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(t, name).copy_(value)


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
