"""Run by `test_checkpoint_ranks.py` on every rank: a DDP loop, cut by a checkpoint, against the whole one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from toys import adamw, adapted, inputs, raw

from loratlas import attach, load_checkpoint, save_checkpoint


def steps(parallel: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, folder: str) -> None:
    attach(parallel, optimizer, total_steps=16)
    for step in range(first, last + 1):
        parallel(inputs() + torch.randn(6, 12)).square().mean().backward()  # every rank draws other noise
        optimizer.step()
        optimizer.zero_grad()
        if step in (5, 9):
            save_checkpoint(folder, parallel, optimizer, step=step, keep=1)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, ends = dist.get_rank(), []
    for resumed in (False, True):
        model = adapted("srlora")
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = adamw(model)
        torch.manual_seed(0 if resumed else 10 + rank)
        start = load_checkpoint(folder, parallel, optimizer).step if resumed else 0
        steps(parallel, optimizer, start + 1, 16, folder)
        ends.append([raw(tensor) for tensor in model.state_dict().values()])
        del parallel  # a reducer that outlives its process group can hang at exit
    there = sorted(path.name for path in Path(folder).iterdir())
    parts = sorted(path.name for path in Path(folder, "checkpoint-9").glob("generators-*.json"))
    sys.stdout.write(f"rank {rank} {ends[0] == ends[1]} {' '.join(there + parts)}\n")  # one write: no mixing
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
