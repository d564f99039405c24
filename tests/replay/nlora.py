"""Replays NLoRA golden trajectories: start, forward, gradients, AdamW steps and the merged update."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import NLoraConfig
from loratlas.engine.model import atlas_layers

LR = 2e-2  # what the README gives for all files


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    weight, r = golden["W"], int(golden["r"])
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
    base[0].weight.data.copy_(weight)
    base[0].bias.data.copy_(golden["bias"])
    close("y_base", base(golden["x"]), golden["y_base"])
    random = not golden["B_init"].any()
    model = get_peft_model(
        base,
        NLoraConfig(
            r=r,
            lora_alpha=float(golden["alpha"]),
            init_weights="slora" if random else True,
            train="all" if "grad_A_0" in golden else "core",
            target_modules=["0"],
        ),
    )
    layer = next(layer for _, layer in atlas_layers(model))
    view = layer.view("default")
    factors: dict[str, Tensor] = {name: getattr(view, name) for name in ("A", "N", "B")}
    for name, factor in factors.items():
        if random:  # the official draw
            factor.data.copy_(golden[f"{name}_init"])
        assert torch.equal(factor, golden[f"{name}_init"]), f"{name}_init"
    assert torch.equal(layer.weight, golden["W_after_init"]), "W_after_init"
    close("delta_init", layer.get_delta_weight("default"), golden["delta_init"])
    close("y_init", model(golden["x"]), golden["y_init"])

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    for step in range(sum(name.startswith("grad_N_") for name in golden)):
        (model(golden["x"]) * golden["g"]).sum().backward()
        for name, factor in factors.items():
            wanted = golden.get(f"grad_{name}_{step}")
            assert (factor.grad is None) == (wanted is None), f"grad_{name}_{step}"
            if wanted is not None:
                close(f"grad_{name}_{step}", factor.grad, wanted)
        optimizer.step()
        optimizer.zero_grad()
        for name, factor in factors.items():
            close(f"{name}_{step + 1}", factor, golden[f"{name}_{step + 1}"])
    close("y_final", model(golden["x"]), golden["y_final"])
    close("delta_final", layer.get_delta_weight("default"), golden["delta_final"])


def close(name: str, ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None, name
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
