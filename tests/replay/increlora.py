"""Replays IncreLoRA golden trajectories of the official layer and allocator, and its learning rates by group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from bases import Apart
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import IncreLoraConfig, attach
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.engine.moments import restarted_rates, run_rate

Golden = dict[str, Tensor]


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as opened:
        facts = opened.metadata()
    if "lr_used_at_step" in golden:
        rates(golden["lr_used_at_step"], facts)
    else:
        trajectory(golden, facts)


# ------------------------------------------------------------------------------------------------------- trajectories


def trajectory(golden: Golden, facts: dict[str, str]) -> None:
    count, steps = len(json.loads(facts["shapes_in_out"])), int(facts["steps"])
    model = get_peft_model(Apart(golden, count), config(facts, count))
    views = [View(layer, "default") for _, layer in atlas_layers(model)]
    first = int(facts["lora_r"])
    with torch.no_grad():
        for k, t in enumerate(views):
            t.A[:first] = golden[f"l{k}.A0"]
            t.B[:, :first] = golden[f"l{k}.B0"]
            t.E[:first] = golden[f"l{k}.E0"][:, 0]
    decay = float(facts["weight_decay"])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], float(facts["lr"]), weight_decay=decay
    )
    lifecycle = attach(model, optimizer)
    for i in range(steps):
        step(i, golden, model, views, optimizer, lifecycle)
        for k, t in enumerate(views):
            # the values of a later block J are those of slot first - 1 + J; the official draws are taken over
            new = [slot for slot in range(len(t.drawn)) if int(t.drawn[slot]) == i + 1]
            take_over(golden, k, t, new, first)
            check(i, k, golden, t)
    for k, t in enumerate(views):
        with torch.no_grad():
            close(f"final.l{k}.deltaW", t.layer.method.delta_weight(t), golden[f"final.l{k}.deltaW"])
            out = t.layer.method.exported(t)
        close(f"exported l{k}", out.up @ out.down, golden[f"final.l{k}.deltaW"])


def config(facts: dict[str, str], count: int) -> IncreLoraConfig:
    r, add = int(facts["target_rank"]), int(facts["incre_rank_num"])
    return IncreLoraConfig(
        r=r,
        r_max=count * r + 2 * add,  # room for everything that one module can get, and its reserve
        init_r=int(facts["lora_r"]),
        lora_alpha=float(facts["lora_alpha"]),
        init_warmup=int(facts["init_warmup"]),
        incre_interval=int(facts["incre_interval"]),
        top_h=int(facts["top_h"]),
        incre_rank_num=add,
        advance_learn=facts["advance_learn"] == "true",
        beta1=float(facts["beta1"]),
        beta2=float(facts["beta2"]),
        orth_reg_weight=float(facts["reg_orth_coef"]),
        restart_warmup=False,
        allocation="official",
        target_modules="all-linear",
    )


def step(i: int, golden: Golden, model: Any, views: list[View], optimizer: Any, lifecycle: Any) -> None:
    outputs = model([golden[f"s{i}.l{k}.x"] for k in range(len(views))])
    loss = lifecycle.terms()
    for k, y in enumerate(outputs):
        close(f"s{i}.l{k}.y", y, golden[f"s{i}.l{k}.y"])
        loss = loss + (y * golden[f"s{i}.l{k}.g"]).sum()
    loss.backward()
    for k, t in enumerate(views):
        if t.seen is not None:
            close(f"s{i}.l{k}.score", t.seen, golden[f"s{i}.l{k}.score"])
    optimizer.step()
    optimizer.zero_grad()


def take_over(golden: Golden, k: int, t: View, new: list[int], first: int) -> None:
    for slot in new:
        (name,) = {key[: -len(".A")] for key in golden if f".l{k}.new{slot - first + 1}.A" in key}
        with torch.no_grad():
            t.A[slot] = golden[f"{name}.A"][0]
            t.B[:, slot] = golden[f"{name}.B"][:, 0]


def check(i: int, k: int, golden: Golden, t: View) -> None:
    step = f"s{i}.l{k}."
    assert int(t.rank) == int(golden[f"{step}ranknum"]), f"{step}ranknum"
    # without advance learning the official reserve is zero and waits; ours is drawn when it is needed
    held = len(golden[f"{step}A"]) if t.cfg.advance_learn else int(t.rank)
    close(f"{step}A", t.A[:held], golden[f"{step}A"][:held])
    close(f"{step}B", t.B[:, :held], golden[f"{step}B"][:, :held])
    values = torch.full((held,), float(t.reserve), dtype=t.E.dtype)
    values[: int(t.rank)] = t.E[: int(t.rank)].detach()
    close(f"{step}E", values, golden[f"{step}E"][:held, 0])
    close(f"{step}exp_avg_ipt", t.average, golden[f"{step}exp_avg_ipt"])
    close(f"{step}exp_avg_unc", t.uncertainty, golden[f"{step}exp_avg_unc"])


# ---------------------------------------------------------------------------------------------------- learning rates


def rates(golden: Tensor, facts: dict[str, str]) -> None:
    """Column 0 is the run's own schedule; a slot born in one of its steps has the rate of a later column."""
    total, warmup = int(facts["num_training_steps"]), int(facts["num_warmup_steps"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=float(facts["base_lr"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda g: g / warmup if g < warmup else (total - g) / (total - warmup)
    )
    births = [int((~column.isnan()).nonzero()[0]) + 1 for column in golden.T[1:]]
    peak = torch.zeros(len(births), dtype=golden.dtype)
    for g, wanted in enumerate(golden):
        run = run_rate(optimizer.param_groups[0])
        close(f"run {g}", torch.tensor(run, dtype=golden.dtype), wanted[0])
        born = torch.tensor([step if step <= g + 1 else 0 for step in births])
        ours = restarted_rates(g + 1, born, peak, run, warmup) * run
        close(f"slots {g}", ours[born > 0], wanted[1:][born > 0])
        optimizer.step()
        schedule.step()


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    ours = ours.detach().reshape(theirs.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
