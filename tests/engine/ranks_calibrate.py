"""Run by `test_distributed.py` on every rank: calibration on ranks with other data, and unequal amounts of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from toys import TARGETS, Toy, config, inputs

from loratlas import calibrate


def loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def main() -> None:
    gather = ("gradient", "fisher", "activation")
    data = [inputs(seed=seed) for seed in range(5)]
    alone = calibrate(Toy(), config("lora"), data, gather=gather, loss=loss)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = data[:2] if rank == 0 else data[2:]
    found = calibrate(Toy(), config("lora"), own, gather=gather, loss=loss)
    for path in TARGETS:
        for name in gather:
            torch.testing.assert_close(found[path][name], alone[path][name], rtol=1e-5, atol=1e-8)
            of_rank0 = found[path][name].clone()
            dist.broadcast(of_rank0, src=0)
            assert torch.equal(found[path][name], of_rank0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
