"""Replays SRLoRA golden trajectories: forward, gradients, scores, events, final weights and the export's factors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from loratlas import SRLoraConfig, attach
from loratlas.engine import pairs
from loratlas.engine.importance import pair_scores
from loratlas.engine.layer import AtlasLayer, joined_factors
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

# what the README gives for files that carry no metadata, by file name
_CONSTANTS: dict[str, dict[str, str]] = {
    "case_a": {
        "scaling": "1.0", "r": "4", "gamma": "0.5", "r_target": "10", "N_all": "12", "schedule": "paper",
        "optimizer_reset": "zero", "score_reset": "all", "beta1": "0.85", "beta2": "0.85",
        "optimizer": "AdamW lr=0.01 wd=0.0",
    },
    "case_b": {
        "scaling": "0.5", "r": "3", "gamma": "0.34", "r_target": "6", "N_all": "12", "schedule": "spread",
        "optimizer_reset": "keep", "score_reset": "replaced", "beta1": "0.85", "beta2": "0.9",
        "optimizer": "AdamW lr=0.005 wd=0.01",
    },
}  # fmt: skip


def replay(path: Path) -> None:
    """Replay one file in both fuse modes; raises AssertionError at the first tensor that differs."""
    with safe_open(path, framework="pt") as file:
        constants = {**_CONSTANTS.get(path.stem, {}), **(file.metadata() or {})}
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for fuse_mode in ("difference", "inplace"):
        _replay(golden, constants, fuse_mode)


def _replay(golden: dict[str, Tensor], constants: dict[str, str], fuse_mode: str) -> None:
    view, model = _model(golden, constants, fuse_mode)
    w0 = golden["W0"]
    close("init_W", pairs.folded_weight(view, w0), golden["init_W"])
    lr, decay = (float(re.search(rf"{name}=([-\d.e]+)", constants["optimizer"])[1]) for name in ("lr", "wd"))
    optimizer = torch.optim.AdamW([view.A, view.B], lr=lr, weight_decay=decay)
    total = int(constants["N_all"])
    lifecycle = attach(model, optimizer, total_steps=total)
    scores: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda *_: scores.update(_scores(view)))
    # hooks run in order of registration: the scores must be seen between the update and an event's reset
    optimizer._optimizer_step_post_hooks.move_to_end(lifecycle._handles[1].id)

    for k in range(1, total + 1):
        step = {name.removeprefix(f"s{k}."): value for name, value in golden.items() if name.startswith(f"s{k}.")}
        y = model(step["x"])
        close(f"s{k}.y", y, step["y"])
        (y * step["g"]).sum().backward()
        close(f"s{k}.gradA", view.A.grad, step["gradA"])
        close(f"s{k}.gradB", view.B.grad, step["gradB"])
        events = int(view.events)
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in {"IA": "IA", "QA": "UA", "IB": "IB", "QB": "UB", "S_pair": "S_pair"}.items():
            close(f"s{k}.{theirs}", scores[ours], step[theirs])
        assert (int(view.events) > events) == ("event.slots" in step), f"step {k}: event at the wrong time"
        if "event.slots" in step:
            slots, dirs = view.log[-len(step["event.slots"]) :, 1], view.log[-len(step["event.slots"]) :, 3]
            assert torch.equal(slots, step["event.slots"]), f"step {k}: slots {slots} instead of {step['event.slots']}"
            assert torch.equal(dirs, step["event.new_dirs"]), f"step {k}: directions {dirs}"
            close(f"s{k}.event.W_after", pairs.folded_weight(view, w0), step["event.W_after"])
        close(f"s{k}.A", view.A, step["A"])
        close(f"s{k}.B", view.B, step["B"])

    delta = view.layer.method.delta_weight(view)
    close("final_deltaW", delta, golden["final_deltaW"])
    close("final_W_total", w0 + delta, golden["final_W_total"])
    assert torch.equal(view.slot_dir, golden["final_slot_dir"]), f"final slot_dir {view.slot_dir}"
    down, up = joined_factors(view) or ()
    assert up.shape == golden["export_B"].shape, (
        f"export has {up.shape[1]} ranks instead of {golden['export_B'].shape[1]}"
    )
    close("export", up @ down, golden["export_B"] @ golden["export_A"])


def _model(golden: dict[str, Tensor], constants: dict[str, str], fuse_mode: str) -> tuple[View, nn.Module]:
    """A one-layer model whose adapter starts from the file's own singular triples."""
    w0, r = golden["W0"], int(constants["r"])
    base = nn.Sequential(nn.Linear(w0.shape[1], w0.shape[0], bias=False, dtype=w0.dtype))
    base[0].weight.data.copy_(w0)
    scaling = float(constants["scaling"])
    options: dict[str, Any] = {name: float(constants[name]) for name in ("gamma", "beta1", "beta2")}
    options |= {name: constants[name] for name in ("schedule", "optimizer_reset", "score_reset")}
    config = SRLoraConfig(
        r=r,
        r_target=int(constants["r_target"]),
        lora_alpha=scaling * r,
        fuse_mode=fuse_mode,
        target_modules=["0"],
        **options,
    )
    model = get_peft_model(base, config)
    layer: AtlasLayer = next(layer for _, layer in atlas_layers(model))
    view = View(layer, "default")
    down, up = pairs.principal_factors(golden["U"], golden["S"], golden["Vh"], scaling)
    with torch.no_grad():
        pairs.start(view, down[:r], up[:, :r])
    view.grow("RA", down[r:].clone())
    view.grow("RB", up[:, r:].clone())
    layer.derive("default")
    close("init_A", view.A, golden["init_A"])
    close("init_B", view.B, golden["init_B"])
    return view, model


def _scores(view: View) -> dict[str, Tensor]:
    moving = {name: getattr(view, name).clone() for name in ("IA", "QA", "IB", "QB")}
    return {**moving, "S_pair": pair_scores(*moving.values())}


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """fp64 to 1e-10, fp32 to 1e-5 relative, as the vectors' README says."""
    tolerance = 1e-10 if theirs.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        ours.detach().to(theirs.dtype), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
