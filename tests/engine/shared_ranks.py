"""Run by `test_shared_distributed.py` on two ranks, each with a seed of its own: NOLA and RandLoRA, DDP and FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import TARGETS, Toy, adamw, inputs

from loratlas import NolaConfig, RandLoraConfig, attach
from loratlas.engine.config import AtlasConfig
from loratlas.engine.distributed import same_start, whole_state_dict

STEPS = 4


def train(how: str, config: AtlasConfig, folder: Path) -> None:
    rank = dist.get_rank()
    model = get_peft_model(Toy(dtype=torch.float64), config)
    same_start(model)
    caller: torch.nn.Module = model
    if how == "fsdp2":
        for name in TARGETS:
            fully_shard(model.get_submodule(f"base_model.model.{name}"))
        fully_shard(model)
    else:
        caller = DistributedDataParallel(model)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS)
    x = inputs(dtype=torch.float64, seed=rank)
    for _ in range(STEPS):
        (caller(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = whole_state_dict(model)
    model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)
    save_file({"y": caller(inputs(dtype=torch.float64)).detach()}, f"{folder}-{rank}.safetensors")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for how in ("ddp", "fsdp2"):
        for cls in (NolaConfig, RandLoraConfig):
            config = cls(r=4, target_modules=TARGETS, seed=dist.get_rank())
            train(how, config, folder / f"{how}-{cls.__name__}")
    dist.barrier()  # a rank that leaves first aborts the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
