"""Run by `test_growing_distributed.py` on two ranks: growth in one process, under DDP and under FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from spread import held, spread
from torch.distributed.fsdp import fully_shard
from toys import TARGETS, Toy, adamw, inputs

from loratlas import IncreLoraConfig, TriAdaptLoraConfig, UserError, attach
from loratlas.engine.growing import GrowingConfig

METHODS = {"increlora": IncreLoraConfig, "triadaptlora": TriAdaptLoraConfig}
STEPS = 10


def config(name: str, how: str) -> GrowingConfig:
    """The penalty needs whole parameters; without it growth is the same under FSDP2."""
    weight = 0.0 if how.endswith("fsdp2") else 0.1
    options = {"incre_rank_num": 2, "init_warmup": 1, "incre_interval": 2, "orth_reg_weight": weight}
    return METHODS[name](r=4, target_modules=TARGETS, **options)


def train(name: str, how: str, xs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model = get_peft_model(Toy(dtype=torch.float64), config(name, how))
    caller = spread(model, how)
    optimizer = adamw(model, weight_decay=0.1)
    lifecycle = attach(model, optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        for x in xs:
            ((caller(x) - 1).square().mean() / len(xs) + lifecycle.terms() / len(xs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return held(model)


def refusal() -> str:
    model = get_peft_model(Toy(), config("increlora", "ddp"))
    fully_shard(model)
    try:
        attach(model, adamw(model), total_steps=STEPS)
    except UserError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    both = [inputs(dtype=torch.float64, seed=seed) for seed in (0, 1)]
    for name in METHODS:
        for how in ("ddp", "fsdp2"):
            save_file(train(name, how, [both[rank]]), folder / f"{name}-{how}-{rank}.safetensors")
    (folder / f"said-{rank}.txt").write_text(refusal())
    dist.barrier()  # a rank that leaves first aborts the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
