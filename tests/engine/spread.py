"""What the scripts of two ranks share: one model trained in three ways, and everything its layers hold afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import TARGETS, views

from loratlas.engine.sharded import whole


def spread(model: nn.Module, how: str) -> nn.Module:
    """What to call: under "fsdp2" the model with its layers sharded in place, under "ddp" a wrapper, else the model."""
    if how == "fsdp2":
        for name in TARGETS:
            fully_shard(model.get_submodule(f"base_model.model.{name}"))
        fully_shard(model)
    return DistributedDataParallel(model) if how == "ddp" else model


def held(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """{"layer.tensor": value} of the tensors called so, of all parameters and buffers if none is named."""
    found: dict[str, torch.Tensor] = {}
    for number, t in enumerate(views(model)):
        for name in names or (*t.layer.method.params, *t.layer.buffer_names()):
            if names or getattr(t, name) is not None:
                found[f"{number}.{name}"] = whole(getattr(t, name).detach()).clone().contiguous()
    return found
