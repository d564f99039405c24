"""Replays LoKU's golden vectors: the inverted hinge loss with its gradient, relative Fisher, FILA's start."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import AtlasLoraConfig, relative_fisher
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.objectives.loku import inverted_hinge

SEED = 22  # of the official code's SVD, by the README


def replay(path: Path) -> None:
    golden = load_file(path)
    logits = golden["ihl.logits"].clone().requires_grad_()
    loss = inverted_hinge(logits, golden["ihl.labels"])
    close("ihl.loss", loss, golden["ihl.loss"], 1e-6)
    close("ihl.grad_logits", torch.autograd.grad(loss, logits)[0], golden["ihl.grad_logits"], 1e-6)

    exact, importance = start(golden, "fila")
    close("importance", importance, golden["fila.importance"], 1e-4)
    close("row_importance", importance.sum(1).sqrt(), golden["fila.row_importance"], 1e-4)
    close("delta_exact_svd", moved(exact), golden["fila.delta_exact_svd"], 1e-4)
    close("residual + delta", golden["fila.residual"] + golden["fila.delta"], golden["fila.W"], 1e-6)

    code, _ = start(golden, "fila-code")
    close("delta", moved(code), golden["fila.delta"], 1e-4)
    residual = (golden["fila.W"] - moved(code) - golden["fila.residual"]).abs().max()
    assert residual < 1e-4, f"residual differs by {residual}"
    for name in ("A", "B"):
        close(f"|{name}|", getattr(code, name).abs(), golden[f"fila.{name}"].abs(), 1e-4)


def start(golden: dict[str, Tensor], init: str) -> tuple[View, Tensor]:
    """The adapter on a layer whose batches have the golden gradients, and the relative importance."""
    weight, rank = golden["fila.W"], golden["fila.A"].shape[0]
    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    base[0].weight.data.copy_(weight)
    config = AtlasLoraConfig(r=rank, lora_alpha=float(golden["fila.s"]) * rank, init_weights=init, target_modules=["0"])
    relative_fisher(
        base,
        config,
        batches(golden, "forget"),
        batches(golden, "retain"),
        loss=lambda model, batch: (model[0].weight * batch["gradient"]).sum(),
    )
    importance = config.calibration["0"]["relative_fisher"]
    torch.manual_seed(SEED)
    model = get_peft_model(base, config)
    return next(View(layer, "default") for _, layer in atlas_layers(model)), importance


def batches(golden: dict[str, Tensor], name: str) -> list[dict[str, Tensor]]:
    counts = golden[f"fila.cnt_{name}"].tolist()
    return [
        {"gradient": golden[f"fila.grad_{name}.{i}"], "labels": torch.tensor([[1] * count + [-100] * 3])}
        for i, count in enumerate(counts)
    ]


def moved(view: View) -> Tensor:
    return view.scaling * view.B0 @ view.A0


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
