"""Replays LoRA-MGPO golden trajectories and the row deviations of LoRA-GGPO's formula."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from loratlas.engine.pair_registry import low_rank_pairs
from loratlas.optim.lora_ggpo import PerturbedAdamW
from loratlas.optim.perturbation import gradient_rows, noise_std

SIGMA, GGPO_BETA = 0.03, 0.01  # what the README gives for all files


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    weight, (r, n_in) = golden["W"], golden["A.init"].shape
    beta, beta1, lr, rho, s = (
        float(f"{float(golden[f'scalar.{name}']):.6g}") for name in ("beta", "beta1", "lr", "rho", "s")
    )
    base = nn.Sequential(nn.Linear(n_in, weight.shape[0], bias=False))
    base[0].weight.data.copy_(weight)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=s * r, target_modules=["0"]))
    (pair,) = low_rank_pairs(model, "the replay")
    pair.down.copy_(golden["A.init"])
    pair.up.copy_(golden["B.init"])
    optimizer = PerturbedAdamW(model, lr, method="mgpo", rho=rho, ema_beta=beta, beta1=beta1)

    for step in range(sum(name.startswith("loss.") for name in golden)):
        # onto nothing, because a difference of outputs would round what a small rho leaves
        eps = optimizer.perturbed(0, torch.eye(n_in), torch.zeros(n_in, weight.shape[0])).T
        close(f"perturb.{step}", eps, golden[f"perturb.{step}"])
        close(f"scale.{step}", eps.norm() / rho, golden[f"scale.{step}"])
        loss = (model(golden["x"]) - golden["y"]).square().mean()
        loss.backward()
        close(f"loss.{step}", loss, golden[f"loss.{step}"])
        close(f"gA.{step}", pair.a.grad, golden[f"gA.{step}"])
        close(f"gB.{step}", pair.b.grad, golden[f"gB.{step}"])
        rowstd = noise_std(pair, gradient_rows([pair])[0], SIGMA, GGPO_BETA)
        close(f"ggpo_rowstd.{step}", rowstd, golden[f"ggpo_rowstd.{step}"])
        optimizer.step()
        optimizer.zero_grad()
        close(f"ema.{step}", optimizer.state[pair.a]["grad_norm"], golden[f"ema.{step}"])
        close(f"A.{step}", pair.a, golden[f"A.{step}"])
        close(f"B.{step}", pair.b, golden[f"B.{step}"])


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-6 of the largest entry, or of 1 where that is smaller."""
    gap = (ours.detach() - theirs).abs().max()
    assert gap <= 1e-6 * theirs.abs().max().clamp_min(1.0), f"{name}: off by {float(gap):.2e}"
