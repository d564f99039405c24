"""Replays SLTrain golden files: the official layer's function, its gradients, and five steps of AdamW."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas.adapters.sltrain import SLTrainLinear

NAMES = {"A": "A", "B": "B", "sparse_value": "values", "bias": "bias", "scaling": "scaling"}


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    learned = said["trainable_scaling"] == "True"
    layer = SLTrainLinear(
        int(said["din"]),
        int(said["dout"]),
        int(said["r"]),
        float(said["sp_ratio"]),
        float(said["alpha"]),
        bias="bias" in golden,
        train_scaling=learned,
    )
    assert len(layer.support) == len(golden["sparse_index"])
    layer.support.copy_(golden["sparse_index"])
    names = {theirs: ours for theirs, ours in NAMES.items() if f"traj0_{theirs}" in golden}
    for theirs, ours in names.items():
        start = golden.get(f"{theirs}_init", torch.ones(1))
        getattr(layer, ours).data.copy_(start)
    x, g = golden["x"], golden["g"]
    if "y_init" in golden:
        close("y_init", layer(x), golden["y_init"])
    optimizer = torch.optim.AdamW(
        [getattr(layer, ours) for ours in names.values()], lr=float(said["lr"]), weight_decay=0
    )
    for step in range(int(said["steps"])):
        (layer(x) - g).square().mean().backward()
        for theirs, ours in names.items():
            close(f"traj{step}_grad_{theirs}", getattr(layer, ours).grad, golden[f"traj{step}_grad_{theirs}"])
        optimizer.step()
        optimizer.zero_grad()
        for theirs, ours in names.items():
            close(f"traj{step}_{theirs}", getattr(layer, ours), golden[f"traj{step}_{theirs}"], 1e-4)
    for theirs, ours in names.items():
        getattr(layer, ours).data.copy_(golden[theirs])
    x = x.clone().requires_grad_()
    y = layer(x)
    close("y", y, golden["y"])
    close("W_effective", layer.dense_weight(), golden["W_effective"])
    y.backward(g)
    close("grad_x", x.grad, golden["grad_x"])
    for theirs, ours in names.items():
        close(f"grad_{theirs}", getattr(layer, ours).grad, golden[f"grad_{theirs}"])


def close(name: str, ours: Tensor | None, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours is not None, name
    said = lambda text: f"{name}: {text}"  # noqa: E731
    torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=said)
