"""Replays WaRA vectors: the analysis matrices, the transform in two dimensions, and the adapter, which needs one."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import WaRAConfig
from loratlas.engine.model import atlas_layers
from loratlas.linalg.wavelets import filters, join, split


def replay(path: Path) -> None:
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        wavelet = filters(name := file.metadata()["wavelet"])
    x, (n_out, n_in) = golden["X"], golden["delta"].shape
    for side, size in (("in", n_in), ("out", n_out)):
        low, high = split(torch.eye(size, dtype=x.dtype), wavelet)
        close(f"P_low_{side}", low.T, golden[f"P_low_{side}"])
        close(f"P_high_{side}", high.T, golden[f"P_high_{side}"])

    core, rows = golden["B_w"] @ golden["A_w"], []
    for band, name_of_band in zip(split(x.T, wavelet), "LH", strict=True):
        parts = split(band.T, wavelet)
        for part, letter in zip(parts, "LH", strict=True):
            close(f"C_{name_of_band}{letter}", part, golden[f"C_{name_of_band}{letter}"])
        rows.append(join(*(core @ part for part in parts), wavelet))
    close("X_hat in two dimensions", join(*(row.T for row in rows), wavelet).T, golden["X_hat"])

    base = nn.Sequential(nn.Linear(n_in, n_out, bias=False, dtype=x.dtype))
    nn.init.zeros_(base[0].weight)
    r = golden["A_w"].shape[0]
    model = get_peft_model(base, WaRAConfig(r=r, wavelet=name, target_modules=["0"]))
    t = next(layer for _, layer in atlas_layers(model)).view("default")
    with torch.no_grad():
        t.A.copy_(golden["A_w"])
        t.B.copy_(golden["B_w"])
    close("X_hat", model(x.T).T, golden["X_hat"])
    close("delta", t.layer.method.delta_weight(t), golden["delta"])


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")
