"""A small regression with a trunk and a head, and plain loops over it with and without LT-SFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratlas import LtSftCallback, LtSftConfig

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


TRUNK = 10 * 16 + 16 + 16 * 16 + 16  # entries to choose from, the norm left out


def batch(step: int, goal: int = 0) -> Batch:
    """Inputs of a step and what another network makes of them."""
    x = torch.randn(12, 10, generator=torch.Generator().manual_seed(1000 + step))
    with torch.random.fork_rng(), torch.no_grad():
        return x, Net(50 + goal)(x)


def shifted(model: nn.Module, *seeds: int) -> Callable[[int], Batch]:
    """Batches labelled by a copy of `model` in which every seed changes 20 entries of a trunk's weight by 1."""
    goal: Any = copy.deepcopy(model)
    for seed in seeds:
        where = torch.randperm(256, generator=torch.Generator().manual_seed(70 + seed))[:20]
        goal.trunk[3].weight.data.view(-1)[where] += 1.0

    def data(step: int) -> Batch:
        with torch.no_grad():
            x = batch(step)[0]
            return x, goal(x)

    return data


@torch.no_grad()
def loss(model: nn.Module, data: Callable[[int], Batch]) -> float:
    """Mean over ten batches that nothing was trained on."""
    return sum(float(F.mse_loss(model(x), y)) for x, y in map(data, range(500, 510))) / 10


def config(**options: Any) -> LtSftConfig:
    return LtSftConfig(**{"num_params": 40, "maskable": "^trunk", **options})


def adamw(model: nn.Module, lr: float = 1e-2, decay: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    data: Callable[[int], Batch] = batch,
    scheduler: Any = None,
) -> None:
    for step in steps:
        x, y = data(step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def tuned(steps: int = 20, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, LtSftCallback]:
    """A network after LT-SFT, and the strategy."""
    model = Net() if model is None else model
    optimizer = adamw(model)
    strategy = config(**options).build().attach(model, optimizer, steps)
    train(model, optimizer, range(steps))
    strategy.detach()
    return model, strategy


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> int:
    """Entries of parameters under `prefix` that are not equal."""
    return sum(int((one[name] != other[name]).sum()) for name in one if name.startswith(prefix))
