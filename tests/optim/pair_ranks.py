"""Run by `test_pairs_distributed.py` on two ranks: every optimizer on pairs under DDP, and FSDP2 refused."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import adapted, inputs, trainable

from loratlas import UserError, attach
from loratlas.engine.parts import OptimizerConfig
from loratlas.optim.lora_ggpo import METHODS, LoraGgpoConfig
from loratlas.optim.lora_plus import LoraPlusConfig
from loratlas.optim.lora_pro import MODES, LoraProConfig

CONFIGS: list[OptimizerConfig] = [
    *(LoraProConfig(mode=mode) for mode in MODES),
    *(LoraGgpoConfig(method=method, sigma=0.3) for method in METHODS),
    LoraPlusConfig(),
]


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    x = inputs(seed=dist.get_rank())  # every rank has other data
    for config in CONFIGS:
        model = adapted("srlora")
        parallel = DistributedDataParallel(model)
        optimizer = config.build(model, lr=1e-3)
        attach(model, optimizer, total_steps=8)
        for _ in range(8):
            (parallel(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        mine = torch.cat([p.detach().flatten() for p in trainable(model)])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both), config
        assert bool(mine.isfinite().all()), config

        sharded = fully_shard(adapted("lora"))
        with pytest.raises(UserError, match="are sharded: use DistributedDataParallel"):
            config.build(sharded, lr=1e-3)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
