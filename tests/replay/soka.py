"""Replays SoKA vectors: the Kronecker SVD of W, the start, gradients, three SGD steps and the merged weight."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas import SoKAConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.linalg import kronecker


def replay(path: Path) -> None:
    golden = load_file(path)
    w, (r, m, n), (_, p, q) = golden["W"], golden["A"].shape, golden["B"].shape
    shape = kronecker.Shape(m, p, n, q)
    close("R", kronecker.rearranged(w, shape), golden["R"])
    u, s, v = kronecker.kronecker_svd(w, shape, min(m * n, p * q))
    close("S", s, golden["S"])
    close("cum_energy", s.square().cumsum(0) / s.square().sum(), golden["cum_energy"])
    close("all terms", kronecker.kronecker_sum(s[:, None, None] * u, v), w)

    base = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype))
    base[0].weight.data.copy_(w)
    config = SoKAConfig(r=r, factor_shape=[m, n], rank_rule=False, target_modules=["0"])
    model = get_peft_model(base, config)
    t = View(next(layer for _, layer in atlas_layers(model)), "default")
    start = kronecker.kronecker_sum(t.A, t.B)
    close("start", start, kronecker.kronecker_sum(golden["A"], golden["B"]))
    close("W_res", w - start, golden["W_res"])
    with torch.no_grad():  # the file's own signs
        for name in ("A", "B"):
            getattr(t, name).copy_(golden[name])
            getattr(t, f"{name}0").copy_(golden[name])

    optimizer = torch.optim.SGD([t.A, t.B], lr=0.01)
    close("y_base", nn.functional.linear(golden["x"], w), golden["y_base"])
    for k in range(3):
        y = model(golden["x"])
        if k == 0:
            close("y_init", y, golden["y_init"])
        (y * golden["g"]).sum().backward()
        if k == 0:
            close("grad_A_0", t.A.grad, golden["grad_A_0"])
            close("grad_B_0", t.B.grad, golden["grad_B_0"])
        optimizer.step()
        optimizer.zero_grad()
    close("A_3", t.A, golden["A_3"])
    close("B_3", t.B, golden["B_3"])
    close("y_final", model(golden["x"]), golden["y_final"])
    close("W_merged", w + t.layer.method.delta_weight(t), golden["W_merged"])


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """1e-8 in float64, 1e-5 in float32, as the vectors' README says."""
    tolerance = 1e-8 if theirs.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
