"""Replays CoDyRA golden files: tasks of a stream, their thresholds, the ranks they keep and the weight they leave."""

from __future__ import annotations

import json
import math
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from loratlas import CoDyRAConfig, attach
from loratlas.adapters.codyra import CoDyRA, next_task
from loratlas.engine.layer import joined_factors
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    """Replay one file with earlier tasks in either form; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
    facts = {name: json.loads(text) for name, text in said.items() if name != "lr_schedule"}
    for earlier in ("stack", "merge"):
        _replay(golden, facts, earlier)


def _replay(golden: dict[str, Tensor], facts: dict[str, Any], earlier: str) -> None:
    weight = golden["W0"]
    config = CoDyRAConfig(
        r=int(facts["r"]),
        max_threshold=float(facts["max_kappa"]),
        threshold_steps=int(facts["lambda_num"]),
        dense_fraction=float(facts["dense_iters"]),
        threshold="official",
        earlier_tasks=earlier,
        target_modules=["0"],
    )
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    base[0].weight.data.copy_(weight)
    model = get_peft_model(base, config)
    t = next(layer for _, layer in atlas_layers(model)).view("default")
    for task in takewhile(lambda number: f"t{number}.A0" in golden, count()):
        if task:
            next_task(model)
        own = {name.removeprefix(f"t{task}."): value for name, value in golden.items() if name.startswith(f"t{task}.")}
        for name, tensor in _tensors(t).items():
            tensor.data.copy_(own[f"{name}0"].reshape(tensor.shape))
        _learn(model, t, own, config, facts)
        down, up = joined_factors(t)
        close(f"t{task}.W_merged", weight + up @ down, own["W_merged"])
        assert torch.equal(t.gates != 0, own["active"].flatten()), f"t{task}.active"


def _learn(model: nn.Module, t: Any, golden: dict[str, Tensor], config: CoDyRAConfig, facts: dict[str, Any]) -> None:
    total, dense = int(facts["total"]), float(facts["dense_iters"]) * int(facts["total"])
    optimizer = torch.optim.AdamW([t.A, t.B, t.gates], lr=facts["lr"], betas=tuple(facts["betas"]), weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda done: 0.5 * (1 + math.cos(math.pi * done / total)))
    attach(model, optimizer, total_steps=total)
    for step in range(total):
        y = model(golden[f"s{step}.x"])
        close(f"s{step}.y", y, golden[f"s{step}.y"])
        if step > dense:
            threshold = CoDyRA().threshold(config, step + 1, total)
            assert math.isclose(threshold, float(golden["threshold_seq"][step]), rel_tol=1e-6), f"threshold of {step}"
        optimizer.zero_grad()
        (y * golden[f"s{step}.g"]).sum().backward()
        optimizer.step()
        scheduler.step()
        for name, tensor in _tensors(t).items():
            close(f"s{step}.{name}", tensor, golden[f"s{step}.{name}"])


def _tensors(t: Any) -> dict[str, Tensor]:
    return {"A": t.A, "B": t.B, "gate": t.gates}


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs.reshape(ours.shape), rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}"
    )
