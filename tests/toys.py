"""Small models of every layer kind, adapter configs by name, a plain training loop and byte-level comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratlas import AtlasLoraConfig, Lifecycle, SRLoraConfig, attach
from loratlas.engine.config import AtlasConfig
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers

KINDS = ("linear", "conv1d", "conv2d", "embedding")
METHODS = ("lora", "pissa", "srlora", "srlora-inplace")
EXACT_START = ("lora", "pissa", "srlora")  # in place, W is rounded when pairs are folded in
TARGETS = ["first", "second"]


class Toy(nn.Module):
    """Two layers of one kind, the first with a bias, the second without where the kind allows it."""

    def __init__(self, kind: str = "linear", dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = {
            "linear": lambda: (nn.Linear(12, 16), nn.Linear(16, 14, bias=False)),
            "conv1d": lambda: (Conv1D(16, 12), Conv1D(14, 16)),
            "conv2d": lambda: (nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 14, 1, bias=False)),
            "embedding": lambda: (nn.Embedding(30, 16, padding_idx=0), nn.Linear(16, 14, bias=False)),
        }[kind]()
        if kind == "conv1d":
            # Conv1D is born with weights so small that nothing would be seen of it
            for layer in (self.first, self.second):
                nn.init.normal_(layer.weight, std=0.3)
                nn.init.normal_(layer.bias)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def inputs(kind: str = "linear", dtype: torch.dtype = torch.float32, ndim: int = 2, seed: int = 5) -> Tensor:
    """A batch of 6 for `Toy(kind)`; ndim counts the dimensions of a linear layer's input."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(0, 30, (6, 7), generator=generator)
    shape = (6, 3, 8, 8) if kind == "conv2d" else (6, *([5] * (ndim - 2)), 12)
    return torch.randn(shape, generator=generator).to(dtype)


def config(name: str, r: int = 4, **options: Any) -> AtlasConfig:
    options = {"target_modules": list(TARGETS), "r": r, **options}
    if name.startswith("srlora"):
        mode = "inplace" if name.endswith("inplace") else "difference"
        return SRLoraConfig(**{"r_target": 12, "fuse_mode": mode, **options})
    return AtlasLoraConfig(**{"init_weights": "pissa" if name == "pissa" else True, **options})


def adapted(
    name: str = "srlora", kind: str = "linear", dtype: torch.dtype = torch.float32, **options: Any
) -> PeftModel:
    model = get_peft_model(Toy(kind, dtype), config(name, **options))
    assert isinstance(model, PeftModel)
    return model


def view(model: nn.Module, layer: str = "first", adapter: str = "default") -> View:
    return next(View(found, adapter) for path, found in atlas_layers(model, adapter) if path.endswith(layer))


def views(model: nn.Module, adapter: str = "default") -> list[View]:
    return [View(layer, adapter) for _, layer in atlas_layers(model, adapter)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=lr, **{"weight_decay": 0.0, **options})


def goal(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)


def train(
    model: nn.Module,
    x: Tensor,
    steps: int = 10,
    *,
    total: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    each: Callable[[int], None] = lambda step: None,
) -> Lifecycle:
    """`steps` steps towards `goal` with the lifecycle attached; `each(step)` runs after every step, from 1."""
    optimizer = optimizer or adamw(model)
    lifecycle = attach(model, optimizer, total_steps=total or steps)
    for step in range(1, steps + 1):
        y = model(x)
        (y - goal(y)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        each(step)
    return lifecycle


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor).encode()


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every base tensor, under its name in the bare model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): raw(tensor)
        for name, tensor in model.state_dict().items()
        if "ATLAS_" not in name
    }


def distance(steps: int, config: AtlasConfig, target: Tensor, weight: Tensor) -> float:
    """||W' - target||^2 / ||W - target||^2 after `steps` steps of AdamW at 1e-2 on it."""
    base = nn.Sequential(nn.Linear(16, 16, bias=False, dtype=torch.float64))
    base[0].weight.data.copy_(weight)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    eye = torch.eye(16, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(eye).T - target).square().sum().backward()
        optimizer.step()
    return float((model(eye).T - target).detach().square().sum() / (weight - target).square().sum())
