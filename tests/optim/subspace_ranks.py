"""Run by `test_ranks.py` on two ranks: subspace optimizers under DDP, rank 1 with other bases of its own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from steps import normal
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loratlas import UserError
from loratlas.optim import projector
from loratlas.optim.dct_adamw import DCTAdamWConfig
from loratlas.optim.fira import FiraConfig
from loratlas.optim.galore import GaLoreConfig

CONFIGS = {
    "galore": GaLoreConfig(r=2, update_proj_gap=2),
    "fira": FiraConfig(r=2, update_proj_gap=2),
    "dct": DCTAdamWConfig(r=2),
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 1:
        # what another LAPACK would do to degenerate directions, and rounding to ties
        plain, chosen = projector.leading_directions, projector.Projector.choose
        projector.leading_directions = lambda *a, **k: -plain(*a, **k).flip(0).contiguous()
        projector.Projector.choose = lambda *a: chosen(*a).flip(1).contiguous()
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = config.build(model, lr=0.02)
        caller = DistributedDataParallel(model)
        for step in range(5):
            caller(normal(3, 6, seed=10 * step + rank)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file(model.state_dict(), folder / f"{name}-{rank}.safetensors")
        del caller  # its reducer would hold on to the group that is taken down below
    with pytest.raises(UserError, match="before the ranks have averaged"):
        GaLoreConfig(r=2, layerwise=True).build(model, lr=0.02)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
