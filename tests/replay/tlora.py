"""Replays TLoRA vectors, which were computed element by element from the published definitions."""

from __future__ import annotations

from pathlib import Path

import torch
from bases import linear
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import TLoraConfig
from loratlas.engine.model import atlas_layers
from loratlas.linalg import tensor_ring


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    weight = golden["W"]
    n_out, n_in = weight.shape
    ins, outs = ([int(part) for part in said[name].split(",")] for name in "IO")
    base = linear(weight)
    model = get_peft_model(
        base,
        TLoraConfig(
            r=int(said["R_residual"]),
            transform_rank=int(said["R_transform"]),
            factors={str(n_out): outs, str(n_in): ins},
            target_modules=["0"],
        ),
    )
    layer = next(layer for _, layer in atlas_layers(model))
    view, names = layer.view("default"), [f"{name}{d}" for name in "ABC" for d in range(1, 5) if f"{name}{d}" in golden]
    for name in names:
        getattr(view, name).data.copy_(golden[name])
    transform = [getattr(view, name) for name in names if name.startswith("A")]
    ups, downs = ([getattr(view, name) for name in names if name.startswith(letter)] for letter in "BC")
    up, down = tensor_ring.ring_factors(ups, downs)
    close("T", tensor_ring.ring_matrix(transform), golden["T"])
    close("Delta", up @ down, golden["Delta"])
    close("W_merged", layer.method.merged(view, weight), golden["W_merged"])
    if "R_I" in golden:
        close("R_I", tensor_ring.identity_distance(transform), golden["R_I"])
        close("R_O", tensor_ring.orthogonality_distance(transform), golden["R_O"])
    y = model(golden["x"])
    close("y", y, golden["y"])
    y.backward(golden["g"])
    for name in names:
        close(f"grad_{name}", getattr(view, name).grad, golden[f"grad_{name}"])


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
