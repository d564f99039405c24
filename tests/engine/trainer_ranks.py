"""Run by `test_distributed_trainer.py` on two ranks: transformers' Trainer under DDP and FSDP2, with a resumed run."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import save_file
from spread import held
from toys import Toy, config, views
from transformers import Trainer, TrainingArguments

from loratlas import LifecycleCallback
from loratlas.engine.sharded import is_sharded

STEPS, STOP = 8, 5


class Task(Toy):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(12, generator=generator), "labels": torch.ones(14)} for _ in range(96)]


def use_fsdp2(trainer: Trainer) -> None:
    """accelerate turns FSDP on for accelerators only; its code for FSDP2, from here on, does not mind the CPU."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SRLoraLinear"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True


def train(folder: Path, name: str, checkpoint: Path | None = None) -> None:
    model = get_peft_model(Task(), config("srlora", r=5, optimizer_reset="corrected"))
    args = TrainingArguments(
        str(folder / name),
        max_steps=STEPS,
        save_steps=STOP,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[LifecycleCallback()])
    if name != "ddp":
        use_fsdp2(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    for t in views(trainer.model):
        assert is_sharded(t.A) == (name != "ddp")
    save_file(held(trainer.model), folder / f"{name}-{dist.get_rank()}.safetensors")
    trainer.save_model(str(folder / name / "final"))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    train(folder, "ddp")
    train(folder, "fsdp")
    dist.barrier()
    train(folder, "resumed", folder / "fsdp" / f"checkpoint-{STOP}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
