"""Run by `test_lt_sft.py` on two ranks: LT-SFT under DDP, and in one process with the batches of both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch.distributed as dist
from safetensors.torch import save_file
from small_net import Net, adamw, batch, config
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

STEPS = 12


def run(shares: list[int], wrap: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Parameters and masks after training on every second batch, or on both as micro-batches."""
    model = Net().double()
    caller, optimizer = wrap(model), adamw(model)
    strategy = config().build().attach(caller, optimizer, STEPS)
    for step in range(STEPS):
        for share in shares:
            x, y = batch(2 * step + share)
            (F.mse_loss(caller(x.double()), y.double()) / len(shares)).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = {f"mask.{name}": mask.double() for name, mask in strategy.state_dict()["masks"].items()}
    return {**masks, **{name: p.detach().clone() for name, p in model.named_parameters()}}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    save_file(run([rank], DistributedDataParallel), Path(sys.argv[1]) / f"{rank}.safetensors")
    dist.barrier()  # a rank that leaves first aborts the other
    dist.destroy_process_group()
