"""Replays LoRA-SB golden vectors: the bases from a first update, and from stored factors the training of the cores."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import LoraSBConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

LAYERS = ("fc1", "fc2")
# how far the official truncated SVD, rounded to bfloat16 and not oversampled, is from the exact one
_OFFICIAL_ERROR = {"synthetic": 5e-3, "sign": 0.15}


class Net(nn.Module):
    def __init__(self, golden: dict[str, Tensor]) -> None:
        super().__init__()
        for i, name in enumerate(LAYERS, 1):
            weight = golden[f"W{i}"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(golden[f"b{i}"])
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    x, target = golden["x"], golden["target"]
    close("y_base", Net(golden)(x), golden["y_base"], 1e-5)
    model, views = _started(golden)
    for name, view in views.items():
        for key, factor in (("A", view.A), ("N", view.N), ("B", view.B)):
            factor.data.copy_(golden[f"{'R' if key == 'N' else key}_{name}"])
    close("y_init", model(x), golden["y_init"], 1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(sum(key.startswith("loss_") for key in golden)):
        loss = (model(x) - target).square().mean()
        close(f"loss_{step}", loss, golden[f"loss_{step}"], 1e-5)
        loss.backward()
        for name, view in views.items():
            close(f"gradR_{name}_{step}", view.N.grad, golden[f"gradR_{name}_{step}"], 1e-5)
        optimizer.step()
        optimizer.zero_grad()
        for name, view in views.items():
            close(f"R_{name}_{step + 1}", view.N, golden[f"R_{name}_{step + 1}"], 2e-6)
    close("y_final", model(x), golden["y_final"], 1e-5)


def _started(golden: dict[str, Tensor]) -> tuple[PeftModel, dict[str, View]]:
    """The model after our start, whose update is compared with the exact truncated SVD and with the official one."""
    signed = "raw_grad_fc1" in golden
    rate = float(golden["eff_lr"]) if signed else 1.0
    config = LoraSBConfig(
        r=golden["R_fc1"].shape[0],
        init_lr=rate,
        init_update="sign" if signed else "raw",
        svd_method="full",
        target_modules=list(LAYERS),
    )
    config.calibration = {
        name: {"gradient": golden[f"raw_grad_{name}"] if signed else -golden[f"dW_{name}"]} for name in LAYERS
    }
    model = get_peft_model(Net(golden), config)
    assert isinstance(model, PeftModel)
    views = {path.rpartition(".")[2]: layer.view("default") for path, layer in atlas_layers(model)}
    for name, view in views.items():
        update, rank = golden[f"dW_{name}"], view.r
        ours = view.layer.get_delta_weight("default")
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
        close(f"truncated SVD of dW_{name}", ours.double(), exact, 1e-5 * float(s[0]))
        official = golden[f"B_{name}"] @ golden[f"R_{name}"] @ golden[f"A_{name}"]
        error = float(torch.dist(ours, official) / torch.linalg.matrix_norm(official))
        assert error <= _OFFICIAL_ERROR["sign" if signed else "synthetic"], f"{name}: {error:.1e} from the official"
    return model, views


def close(name: str, ours: Tensor | None, theirs: Tensor, tolerance: float) -> None:
    assert ours is not None, name
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
