"""Run by `test_cores_distributed.py` on two ranks: LaMDA in one process, under DDP and under FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from spread import held, spread
from toys import TARGETS, Toy, adamw, inputs

from loratlas import LamdaConfig, attach

STEPS = 8


def train(how: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Factors after a run in which B freezes at half time, and how many tensors still have optimizer state."""
    model = get_peft_model(Toy(dtype=torch.float64), LamdaConfig(r=4, freeze_fraction=0.5, target_modules=TARGETS))
    caller = spread(model, how)
    optimizer = adamw(model, weight_decay=0.1)
    attach(model, optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        (caller(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**held(model, "A", "N", "B", "frozen"), "states": torch.tensor(len(optimizer.state))}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    parts = [inputs(dtype=torch.float64, seed=seed) for seed in (0, 1)]
    results = {"one": torch.cat(parts), "ddp": parts[dist.get_rank()], "fsdp2": parts[dist.get_rank()]}
    for how, x in results.items():
        save_file(train(how, x), folder / f"{how}-{dist.get_rank()}.safetensors")
    dist.barrier()  # a rank that leaves first aborts the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
