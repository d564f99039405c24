"""Replays TriAdaptLoRA golden trajectories of the official layer variants and allocator."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from bases import Apart
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratlas import TriAdaptLoraConfig, attach
from loratlas.adapters.triadaptlora import core
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

Golden = dict[str, Tensor]


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as opened:
        facts = opened.metadata()
    count = len(json.loads(facts["shapes_in_out"]))
    model = get_peft_model(Apart(golden, count), config(facts, count))
    views = [View(layer, "default") for _, layer in atlas_layers(model)]
    for k, t in enumerate(views):
        begin(golden, k, t)
    initial = int(views[0].block.max()) + 1
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        float(facts["lr"]),
        weight_decay=float(facts["weight_decay"]),
    )
    attach(model, optimizer)
    for i in range(1 + max(int(key[1:].partition(".")[0]) for key in golden if key.endswith(".l0.y"))):
        outputs = model([golden[f"s{i}.l{k}.x"] for k in range(count)])
        loss = torch.zeros((), dtype=torch.float64)
        for k, y in enumerate(outputs):
            close(f"s{i}.l{k}.y", y, golden[f"s{i}.l{k}.y"])
            loss = loss + (y * golden[f"s{i}.l{k}.g"]).sum()
        before = torch.stack([t.norm for t in views])
        loss.backward()
        if i == 0:
            norms = torch.stack([norm for t in views for norm in gradient_norms(t)])
            close("s0.gradnorm", norms.sort().values, golden["s0.gradnorm"].sort().values)
        optimizer.step()
        optimizer.zero_grad()
        for k, t in enumerate(views):
            take_over(golden, k, t, i, initial)
            check(golden, k, t, i, before[k])
    for k, t in enumerate(views):
        for block in range(int(t.block[: int(t.rank)].max()) + 1):
            rows = block_slots(t, block)
            width = int(rows[-1]) + 1
            close(f"final.l{k}.Crow{block}", t.L[rows, :width], golden[f"final.l{k}.Crow{block}"])
            close(f"final.l{k}.Ccol{block}", t.U[:width, rows], golden[f"final.l{k}.Ccol{block}"])


def config(facts: dict[str, str], count: int) -> TriAdaptLoraConfig:
    r, add = int(facts["reference_rank"]), int(facts["incre_rank_num"])
    return TriAdaptLoraConfig(
        r=r,
        r_max=count * (r + add),
        init_r=int(facts["init_rank"]),
        lora_alpha=float(facts["lora_alpha"]),
        init_warmup=int(facts["init_warmup"]),
        incre_interval=int(facts["incre_interval"]),
        incre_rank_num=add,
        rank_growth="linear" if facts["rank_growth_model"] == "linear" else "exponential",
        init_variant="c0" if "c0" in facts["source"] else "single",
        total_step=int(facts["total_step"]),
        orth_reg_weight=0.0,
        allocation="official",
        target_modules="all-linear",
    )


@torch.no_grad()
def begin(golden: Golden, k: int, t: View) -> None:
    rank = int(t.rank)
    t.A[:rank] = golden[f"l{k}.init.A"]
    t.B[:, :rank] = golden[f"l{k}.init.B"]
    for block in t.block[:rank].unique().tolist():
        place(t, block, golden[f"l{k}.init.Crow{block}"], golden[f"l{k}.init.Ccol{block}"])
    t.norm.copy_(t.layer.method.size(t))
    close(f"l{k}.init.preNorm", t.norm, golden[f"l{k}.init.preNorm"])


@torch.no_grad()
def take_over(golden: Golden, k: int, t: View, i: int, initial: int) -> None:
    """The official draws of the blocks born in this step."""
    born = t.block[t.born == i + 1].unique().tolist()
    for block in born:
        name, slots = f"s{i}.l{k}.new{block - initial + 1}", block_slots(t, block)
        t.A[slots] = golden[f"{name}.A"]
        t.B[:, slots] = golden[f"{name}.B"]
        place(t, block, golden[f"{name}.Crow"], golden[f"{name}.Ccol"])


def place(t: View, block: int, row: Tensor, column: Tensor) -> None:
    slots = block_slots(t, block)
    t.L[slots, : row.shape[1]] = row
    t.U[: column.shape[0], slots] = column


def block_slots(t: View, block: int) -> Tensor:
    return (t.block[: int(t.rank)] == block).nonzero()[:, 0]


def gradient_norms(t: View) -> list[Tensor]:
    return [getattr(t, name).grad.norm() for name in ("A", "B", "L", "U")]


def check(golden: Golden, k: int, t: View, i: int, before: Tensor) -> None:
    step, rank = f"s{i}.l{k}.", int(t.rank)
    assert rank == int(golden[f"{step}ranknum"]), f"{step}ranknum"
    close(f"{step}A", t.A[:rank], golden[f"{step}A"])
    close(f"{step}B", t.B[:, :rank], golden[f"{step}B"])
    close(f"{step}preNorm", t.norm, golden[f"{step}preNorm"])
    if f"s{i}.threshold" in golden:
        close(f"{step}score", t.norm - before, golden[f"{step}score"])
    with torch.no_grad():
        out = t.layer.method.exported(t)
        close(f"{step}deltaW", t.layer.method.delta_weight(t), golden[f"{step}deltaW"])
        close(f"{step}exported", out.up @ out.down, golden[f"{step}deltaW"])
        c = core(t, t.L, t.U)
    assert not c[rank:].any()
    assert not c[:, rank:].any()


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")
