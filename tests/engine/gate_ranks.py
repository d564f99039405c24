"""Run by `test_gates_distributed.py` on two ranks: SoRA, CoDyRA and DiffoRA in one process, under DDP and FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from spread import held, spread
from toys import TARGETS, Toy, adamw, inputs

from loratlas import CoDyRAConfig, DiffoRAConfig, SoRAConfig, attach
from loratlas.adapters.codyra import next_task
from loratlas.engine.config import AtlasConfig

STEPS = 12
SHARED: dict[str, Any] = {"r": 5, "target_modules": list(TARGETS)}
SEARCH: dict[str, Any] = {"search_steps": 6, "warmup_steps": 1, "arch_lr": 0.1}
CONFIGS: dict[str, AtlasConfig] = {
    "sora": SoRAConfig(xi_schedule=[0.01, 0.05], sparse_lambda=0.0, **SHARED),
    "codyra": CoDyRAConfig(max_threshold=0.3, **SHARED),
    "diffora": DiffoRAConfig(after_search="retrain", **SEARCH, **SHARED),
    "shared": DiffoRAConfig(share_unselected="per_type", scope="global", budget_modules=1, **SEARCH, **SHARED),
}
SETUPS = ("one", "ddp", "fsdp2")


class Square(Toy):
    """Two layers of one shape, which can share a pair."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float64)
        self.first = torch.nn.Linear(12, 12, dtype=torch.float64)
        self.second = torch.nn.Linear(12, 12, dtype=torch.float64)


def train(config: AtlasConfig, how: str, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that the layers hold after a run; CoDyRA learns two tasks."""
    torch.manual_seed(3)
    model = get_peft_model(Square(), config)
    if how != "one":
        torch.manual_seed(dist.get_rank())  # what a method draws later may not come from here
    caller = spread(model, how)
    x = torch.cat(parts) if how == "one" else parts[dist.get_rank()]
    optimizer = adamw(model, weight_decay=0.1)
    for task in range(2 if isinstance(config, CoDyRAConfig) else 1):
        if task:
            next_task(model, optimizer)
        attach(model, optimizer, total_steps=STEPS)
        for _ in range(STEPS):
            (caller(x + task) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return held(model)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    parts = [inputs(dtype=torch.float64, seed=seed) for seed in (0, 1)]
    for name, config in CONFIGS.items():
        for how in SETUPS:
            save_file(train(config, how, parts), folder / f"{name}-{how}-{dist.get_rank()}.safetensors")
    dist.barrier()  # a rank that leaves first aborts the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
