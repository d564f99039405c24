"""Checkpoints of plain training loops: written whole or not at all, and resumed bit for bit.

    start = load_checkpoint("out", model, optimizer).step if newest_checkpoint("out") else 0
    attach(model, optimizer, total_steps=1000)
    for step in range(start + 1, 1001):
        ...                                                   # batch number `step`, backward, optimizer.step()
        if step % 100 == 0:
            save_checkpoint("out", model, optimizer, step=step, keep=2)

`AtomicCheckpoints` does the same for transformers' Trainer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer

from loratlas.engine.lifecycle import is_attached
from loratlas.engine.sharded import is_sharded
from loratlas.errors import UserError
from loratlas.train.complete import checkpoint_name, find_checkpoint, newest_checkpoint, whole_checkpoint
from loratlas.train.model_state import check_configs, read_model, write_model
from loratlas.train.optimizer_state import optimizer_state, read_optimizer_state, restore_optimizer
from loratlas.train.random_state import generator_states, set_generator_states
from loratlas.train.state import read_state, write_state

__all__ = ["Resumed", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]


class Resumed(NamedTuple):
    """Where a loaded checkpoint stands.

    Attributes:
        step: optimizer steps done.
        extra: what `save_checkpoint` was given.
        path: directory of the checkpoint.
    """

    step: int
    extra: Any
    path: Path


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    *,
    step: int,
    extra: Any = None,
    keep: int | None = None,
) -> Path:
    """Write everything that training needs to go on to `directory`/checkpoint-`step`, atomically.

    That is: the adapters as PEFT saves them (so the directory loads with `PeftModel.from_pretrained`), what else trains
    beside them, the state of optimizer and scheduler, the generators of Python, NumPy, torch and CUDA, and `extra`. A
    process that is killed at any moment leaves the earlier checkpoints whole. Files are safetensors and JSON.

    In a distributed run every rank calls it.

    Args:
        model: a PEFT model, also inside DistributedDataParallel or torch.compile.
        optimizer: any torch optimizer whose state is made of tensors and numbers; accelerate's wrapper as well.
        scheduler: anything with `state_dict` and `load_state_dict`.
        step: optimizer steps done.
        extra: anything made of tensors, arrays, numbers, texts, lists, tuples and dictionaries, such as the state of
            a generator of your own.
        keep: how many checkpoints stay; older ones are removed when the new one is complete. None keeps all.

    Returns:
        The directory of the checkpoint.

    Raises:
        UserError: not a PEFT model, a sharded one, or state that cannot be written. `DiskFull` names the checkpoint
            that is left.
    """
    peft, target = _peft_model(model), Path(directory) / checkpoint_name(step)
    with whole_checkpoint(target, step, keep=keep) as folder:
        if _rank() == 0:
            write_model(folder, peft)
            write_state(folder, "optimizer", optimizer_state(peft, optimizer))
            if scheduler is not None:
                write_state(folder, "scheduler", scheduler.state_dict())
            write_state(folder, "extra", {"step": step, "extra": extra})
        write_state(folder, generators(_rank()), generator_states())
    return target


def load_checkpoint(
    directory: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, scheduler: Any = None
) -> Resumed:
    """Put model, optimizer, scheduler and generators back where `save_checkpoint` found them.

    Parameters are written in place. Build the objects as for a new run, load, then call `attach`.

    Args:
        directory: a checkpoint, or a directory of them: then the newest complete one, and a logged warning names newer
            ones that are partial or damaged.

    Raises:
        UserError: no complete checkpoint, adapters configured otherwise (the sentence names the fields), an optimizer
            over other parameters, a scheduler that was not saved, or `attach` called too early.
    """
    peft, folder = _peft_model(model), find_checkpoint(directory)
    if is_attached(optimizer):
        raise UserError("call load_checkpoint before attach: attach reads from the model how far training has come.")
    saved = (folder / "scheduler.json").is_file()
    if saved != (scheduler is not None):
        how = "with" if saved else "without"
        raise UserError(f"{folder} was saved {how} a scheduler: load it {how} one too.")
    check_configs(folder, peft)
    state = read_optimizer_state(folder, peft, optimizer)
    read_model(folder, peft)
    restore_optimizer(optimizer, state)
    if scheduler is not None:
        scheduler.load_state_dict(read_state(folder, "scheduler"))
    set_generator_states(read_state(folder, generators(_rank())))
    found = read_state(folder, "extra")
    return Resumed(found["step"], found["extra"], folder)


def generators(rank: int) -> str:
    """Name of the generators' state of one rank."""
    return f"generators-{rank}"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _peft_model(model: nn.Module) -> PeftModel:
    inner: Any = model
    while not isinstance(inner, PeftModel):
        inner = getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            raise UserError(f"checkpoints are of PEFT models (get_peft_model), but this is a {type(model).__name__}.")
    if any(is_sharded(parameter) for parameter in inner.parameters()):
        raise UserError(
            "the model is sharded (FSDP2), and save_checkpoint does not gather shards: save it as the guide to "
            "several GPUs shows."
        )
    return inner
