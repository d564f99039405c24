"""Replays NOLA's reference vectors: the official bases from their seeds, training steps, gradients, the ViT variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import NolaConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.linalg.seeded import Stream


def replay(path: Path) -> None:
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        facts = {name: float(value) for name, value in file.metadata().items()}
    if "ka" in facts:
        replay_vit(golden, facts)
    else:
        for keep in (True, False):
            replay_lm(golden, facts, keep_bases=keep)


def replay_lm(golden: dict[str, Tensor], facts: dict[str, float], *, keep_bases: bool) -> None:
    config = NolaConfig(
        r=int(facts["r"]), lora_alpha=facts["alpha"], num_basis=int(facts["num_basis"]), keep_bases=keep_bases
    )
    model, t = adapted(golden["W"], config)
    t.seeds.copy_(torch.cat((golden["seed_A"], golden["seed_B"], t.seeds[2:])))
    t.layer.derive("default")
    t.layer.store("A0")["default"] = golden["A0"]
    for bases, name in zip(t.layer.method.bases(t), ("A", "B"), strict=True):
        assert torch.equal(bases.whole().view(golden[f"basis_{name}"].shape), golden[f"basis_{name}"]), name
    close("y_init", model(golden["x"]), golden)

    trained = [t.coef_A, t.coef_B]
    optimizer = torch.optim.AdamW(trained, lr=facts["lr"], weight_decay=0.0)
    for step in range(int(facts["steps"])):
        optimizer.zero_grad()
        (model(golden["x"]) - golden["g"]).square().mean().backward()
        for name in ("coef_A", "coef_B"):
            close(f"traj{step}_grad_{name}", getattr(t, name).grad, golden, 1e-3)
        optimizer.step()
        for name in ("coef_A", "coef_B"):
            close(f"traj{step}_{name}", getattr(t, name), golden, 1e-3)
    close("traj_y_final", model(golden["x"]), golden, 1e-3)
    check_function(model, t, golden)


def replay_vit(golden: dict[str, Tensor], facts: dict[str, float]) -> None:
    n_in, r, n_out = int(facts["din"]), int(facts["rank"]), int(facts["dout"])
    config = NolaConfig(r=r, variant="vit", num_basis=int(facts["ka"]), num_basis_b=int(facts["kb"]))
    model, t = adapted(torch.zeros(n_out, n_in), config)
    assert t.scaling == facts["scale"]
    stream = Stream(0)
    for bases, name in zip(t.layer.method.bases(t), ("A", "B"), strict=True):
        # the official code draws both from one stream, the same in every layer
        drawn = stream.uniform((bases.k, *bases.shape), bases.bound)
        assert torch.equal(drawn, golden[f"basis_{name}"]), name
        t.layer.store(f"bases_{name}")["default"] = drawn.flatten(1)
        close(f"coef_{name}_init", getattr(t, f"coef_{name}"), golden)
    close("y_init", model(golden["x"]), golden)
    check_function(model, t, golden)


def check_function(model: nn.Module, t: View, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        t.coef_A.copy_(golden["coef_A"])
        t.coef_B.copy_(golden["coef_B"])
    x = golden["x"].clone().requires_grad_(True)
    y = model(x)
    close("y", y, golden)
    wanted = {"grad_coef_A": t.coef_A, "grad_coef_B": t.coef_B, "grad_x": x}
    grads = torch.autograd.grad((y * golden["g"]).sum(), list(wanted.values()))
    for name, grad in zip(wanted, grads, strict=True):
        if name in golden:
            close(name, grad, golden)
    if "delta" in golden:
        close("delta", t.layer.method.delta_weight(t), golden)


def adapted(weight: Tensor, config: NolaConfig) -> tuple[Any, View]:
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    base[0].weight.data.copy_(weight)
    config.target_modules = {"0"}
    model = get_peft_model(base, config)
    return model, next(View(layer, "default") for _, layer in atlas_layers(model))


def close(name: str, ours: Tensor, golden: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        ours.detach(), golden[name], rtol=tolerance, atol=tolerance / 10, msg=lambda text: f"{name}: {text}"
    )
