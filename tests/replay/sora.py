"""Replays SoRA golden files: trajectories of the official layer with its optimizer for gates, and its threshold."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import SoRAConfig, attach
from loratlas.engine.gates import threshold_
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        facts = {name: _number(value) for name, value in (file.metadata() or {}).items()}
    if "p_in" in golden:
        _table(golden, facts)
    else:
        _trajectory(golden, facts)


def _table(golden: dict[str, Tensor], facts: dict[str, object]) -> None:
    for mode in ("official", "prox"):
        found = golden["p_in"].clone()
        threshold_([found], float(facts["lam"]), mode)
        close(mode, found, golden[f"p_out_{mode}"])
    low, high, n = (float(part.partition("=")[2]) for part in str(facts["schedule"]).split(","))
    for name in ("linear", "log_linear", "exp_linear"):
        made = SoRAConfig(xi_schedule=name, xi=low, xi_max=high, stages=int(n)).thresholds()
        close(name, torch.tensor(made, dtype=torch.float64), golden[f"sched_{name}"])


def _trajectory(golden: dict[str, Tensor], facts: dict[str, object]) -> None:
    weight, r = golden["W"], golden["A0"].shape[0]
    steps, lr = sum(name.endswith(".lambda2") for name in golden), float(facts["lr"])
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    base[0].weight.data.copy_(weight)
    # every step is a stage of its own, with the threshold that was in force
    stages = [float(golden[f"s{step}.lambda2"]) for step in range(steps)]
    options = {"r": r, "lora_alpha": float(facts["alpha"]), "sparse_lambda": float(facts["sparse_lambda"])}
    model = get_peft_model(base, SoRAConfig(**options, threshold="official", xi_schedule=stages, target_modules=["0"]))
    t = next(layer for _, layer in atlas_layers(model)).view("default")
    tensors = {"A": t.A, "B": t.B, "gate": t.gates}
    for name, own in tensors.items():
        own.data.copy_(golden[f"{name}0"].reshape(own.shape))
    # the decay of 0.1 may not reach the gate; `eps` is added before the bias correction in the official optimizer
    gate = {"params": [t.gates], "eps": 1e-6}
    optimizer = torch.optim.AdamW([{"params": [t.A, t.B]}, gate], lr=lr, weight_decay=0.1)
    lifecycle = attach(model, optimizer, total_steps=steps)
    for step in range(steps):
        y = model(golden[f"s{step}.x"])
        close(f"s{step}.y", y, golden[f"s{step}.y"])
        optimizer.zero_grad()
        ((y * golden[f"s{step}.g"]).sum() + lifecycle.terms()).backward()
        for name, ours in (("gradA", t.A.grad), ("gradB", t.B.grad), ("grad_gate", t.gates.grad)):
            close(f"s{step}.{name}", ours, golden[f"s{step}.{name}"])
        optimizer.param_groups[1]["eps"] = 1e-6 / (1 - 0.999 ** (step + 1)) ** 0.5
        optimizer.step()
        for name, own in tensors.items():
            close(f"s{step}.{name}", own, golden[f"s{step}.{name}"])


def _number(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs.reshape(ours.shape), rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}"
    )
