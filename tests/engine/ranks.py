"""Run by `test_distributed.py` on every rank: DDP training of SRLoRA; prints a hash of everything it decided."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from toys import adamw, adapted, inputs, raw, views

from loratlas import attach


def main(fuse_mode: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = adapted("srlora", fuse_mode=fuse_mode)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=16)
    x = inputs(seed=rank)  # every rank has other data
    for _ in range(16):
        parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = hashlib.sha256()
    for t in views(model):
        for name in ("A", "B", "A0", "B0", "HA", "HB", "IA", "QA", "IB", "QB", "log", "slot_dir", "cursor", "events"):
            found.update(raw(getattr(t, name)))
    sys.stdout.write(f"rank {rank} events {int(views(model)[0].events)} {found.hexdigest()}\n")  # one write: no mixing
    sys.stdout.flush()
    del parallel  # a reducer that outlives its process group can hang at exit
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
