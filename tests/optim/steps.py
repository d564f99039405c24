"""Gradients to feed, parameters to step and a state to compare, for the tests of subspace optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

TALL, WIDE = (12, 6), (5, 9)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=100 + i, dtype=dtype)) for i, shape in enumerate(shapes)]


def feed(parameters: Sequence[Tensor], step: int) -> None:
    """The gradient of that step, the same for the same parameters."""
    for i, p in enumerate(parameters):
        p.grad = normal(*p.shape, seed=1000 * step + i, dtype=p.dtype)


def run(optimizer: Optimizer, parameters: Sequence[Tensor], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        feed(parameters, step)
        optimizer.step()


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    return sum(t.numel() * t.element_size() for t in tensors)


def same_state(one: Optimizer, other: Optimizer) -> bool:
    def everything(optimizer: Optimizer) -> list[dict[str, Any]]:
        return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]

    pairs = list(zip(everything(one), everything(other), strict=True))
    return all(
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a) for a, b in pairs
    )


def regression(optimizer_of: Any, steps: int, shape: tuple[int, int] = (20, 16)) -> float:
    """||W - target||^2 after `steps` steps of full-rank regression on it from W = 0, with a linear schedule to 0."""
    weight, target = nn.Parameter(torch.zeros(shape)), normal(*shape, seed=7)
    optimizer = optimizer_of(weight)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    return float((weight - target).detach().square().sum())
