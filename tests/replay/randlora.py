"""Replays RandLoRA's reference vectors: the LM code's layer and training, PEFT's scaling, the vision code, seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import RandLoraConfig
from loratlas.adapters.randlora import RandLora
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers


def replay(path: Path) -> None:
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        facts = {name: float(value) for name, value in (file.metadata() or {}).items()}
    if "peft021_sparse_A" in golden:
        replay_seeds(golden)
    elif "scaling_official" in golden:
        replay_lm(golden, facts)
    else:
        replay_vision(golden, facts)


def replay_lm(golden: dict[str, Tensor], facts: dict[str, float]) -> None:
    options = {"r": int(facts["r"]), "lora_alpha": facts["alpha"]}
    model, t = adapted(golden, RandLoraConfig(**options), golden["basis_A"], golden["basis_B"])
    close("lambda_init", t.lam, golden)
    close("gamma_init", t.gam, golden)
    close("y_init", model(golden["x"]), golden)
    optimizer = torch.optim.AdamW([t.lam, t.gam], lr=facts["lr"], weight_decay=0.01)
    for step in range(int(facts["steps"])):
        optimizer.zero_grad()
        (model(golden["x"]) - golden["g"]).square().mean().backward()
        close(f"traj{step}_grad_lambda", t.lam.grad, golden, 1e-4)
        close(f"traj{step}_grad_gamma", t.gam.grad, golden, 1e-4)
        optimizer.step()
        close(f"traj{step}_lambda", t.lam, golden, 1e-4)
        close(f"traj{step}_gamma", t.gam, golden, 1e-4)
    check_function(model, t, golden)
    close("delta_official", t.layer.method.delta_weight(t), golden)

    config = RandLoraConfig(**options, scaling="peft")
    peft_model, t = adapted(golden, config, golden["basis_A"], golden["basis_B"])
    put(t, golden["lambda"], golden["gamma"])
    close("y_peft021", peft_model(golden["x"]), golden)
    close("delta_peft021", t.layer.method.delta_weight(t), golden)


def replay_vision(golden: dict[str, Tensor], facts: dict[str, float]) -> None:
    """The same layer with axes in another order, alpha = 1, and sometimes one basis more than full rank takes."""
    config = RandLoraConfig(r=int(facts["r"]), lora_alpha=1, scaling="peft")
    a, b = golden["basis_A"].movedim(0, 1).contiguous(), golden["basis_B"].movedim(0, 1).contiguous()
    model, t = adapted(golden, config, a, b)
    put(t, golden["lambda"].T.contiguous(), golden["gamma"])
    check_function(model, t, {**golden, "grad_lambda": golden["grad_lambda"].T})


def replay_seeds(golden: dict[str, Tensor]) -> None:
    method, toys = RandLora(), [(3, 10, 14), (3, 14, 8)]
    dense = method.make_shared(RandLoraConfig(r=4, seed=8539), [(4, 12, 12)])
    for name, value in dense.items():
        close(f"official_dense_{name}_{'key8539_r4_12x12'}", value, golden, 1e-6)
    for basis in ("sparse", "very-sparse"):
        drawn = method.make_shared(RandLoraConfig(r=3, seed=7, basis=basis), toys)
        for name, value in drawn.items():
            close(f"peft021_{basis.replace('-', '')}_{name}", value, golden, 1e-6)
        first = golden[f"peft021_{basis.replace('-', '')}_gamma_l1"]
        assert tuple(first.shape) == method.shapes(RandLoraConfig(r=3), 3, 10, 14)["gam"]


def check_function(model: nn.Module, t: View, golden: dict[str, Tensor]) -> None:
    if t.lam.shape == golden["lambda"].shape:
        put(t, golden["lambda"], golden["gamma"])
    x = golden["x"].clone().requires_grad_("grad_x" in golden)
    y = model(x)
    close("y", y, golden)
    wanted = {"grad_lambda": t.lam, "grad_gamma": t.gam, **({"grad_x": x} if "grad_x" in golden else {})}
    grads = torch.autograd.grad((y * golden["g"]).sum(), list(wanted.values()))
    for name, grad in zip(wanted, grads, strict=True):
        close(name, grad, golden)


def put(t: View, lam: Tensor, gam: Tensor) -> None:
    t.layer.store("lam")["default"] = nn.Parameter(lam)
    t.layer.store("gam")["default"] = nn.Parameter(gam)


def adapted(golden: dict[str, Tensor], config: RandLoraConfig, a: Tensor, b: Tensor) -> tuple[Any, View]:
    n_out, n_in = golden["W"].shape
    base = nn.Sequential(nn.Linear(n_in, n_out))
    base[0].weight.data.copy_(golden["W"])
    base[0].bias.data.copy_(golden["bias"])
    config.target_modules = {"0"}
    model = get_peft_model(base, config)
    t = next(View(layer, "default") for _, layer in atlas_layers(model))
    t.layer.store("A")["default"], t.layer.store("B")["default"] = a, b
    return model, t


def close(name: str, ours: Tensor, golden: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    largest = float(golden[name].abs().max())
    torch.testing.assert_close(
        ours.detach(), golden[name], rtol=0.0, atol=tolerance * (1 + largest), msg=lambda text: f"{name}: {text}"
    )
