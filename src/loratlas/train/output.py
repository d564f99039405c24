"""The folder of a run: what lies in it, how it is cleared, written and found again.

adapter/        PEFT's folder, of a run that trained an adapter
model/          the whole model, of a run that trained the base model's own weights
delta/          what a strategy leaves beside it, such as LT-SFT's sparse delta
result.json, config.yaml, checkpoints/
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from loratlas.analysis.adapter_folder import MODEL
from loratlas.errors import UserError
from loratlas.files import whole_directory, write_json
from loratlas.lock import locked
from loratlas.train.complete import newest_checkpoint
from loratlas.train.data import TaskData

RESULT, ADAPTER, CHECKPOINTS = "result.json", "adapter", "checkpoints"
TASK = "task.json"  # beside the weights: which task they answer, the names of its classes, their base model


def prepare_output(directory: str | Path, *, overwrite: bool = False) -> Path:
    """Clear the way for a new run or comparison in `directory`; it is made when something is written.

    Raises:
        UserError: there is something in it and `overwrite` is False, or it is a file.
    """
    path = Path(directory)
    if path.is_file():
        raise UserError(f"{path} is a file; give a directory to write into.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"{path} is not empty: choose another --out, or add --overwrite to replace what is there.")
        with locked(path):
            shutil.rmtree(path)
    return path


def checkpoint_of(output_dir: str) -> str:
    """The newest complete checkpoint of a run; raises `UserError` if there is none."""
    folder = Path(output_dir) / CHECKPOINTS
    newest = newest_checkpoint(folder) if folder.is_dir() else None
    if newest is None:
        raise UserError(
            f"{folder} holds no checkpoint to resume from; --save-every writes them, and Ctrl-C before it leaves."
        )
    return str(newest)


def save_weights(model: PeftModel | PreTrainedModel, task: TaskData, output_dir: str, base: str) -> Path:
    """Write adapter/ or, for a model without one, model/, whole or not at all; the other one goes. base: its name."""
    adapter = isinstance(model, PeftModel)
    target, other = (Path(output_dir) / name for name in ((ADAPTER, MODEL) if adapter else (MODEL, ADAPTER)))
    note = {"task": task.task, "labels": task.labels}
    with whole_directory(target) as folder:
        model.save_pretrained(str(folder))
        task.processor.save_pretrained(str(folder))
        write_json(folder / TASK, note if adapter else {**note, "base_model": base})
    shutil.rmtree(other, ignore_errors=True)
    return target


def drop_weights(output_dir: str | Path) -> None:
    """Remove what `save_weights` wrote."""
    for name in (ADAPTER, MODEL):
        shutil.rmtree(Path(output_dir) / name, ignore_errors=True)


def drop_empty_checkpoints(output_dir: str) -> None:
    """Trainer makes its directory even if no checkpoint is asked for."""
    directory = Path(output_dir) / CHECKPOINTS
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def read_note(folder: Path) -> dict[str, Any] | None:
    """task.json of `folder`, None where no run has left one; raises `UserError` if it is damaged."""
    file = folder / TASK
    if not file.is_file():
        return None
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        return {**note, "task": note["task"], "labels": note["labels"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: copy the folder again, or remove the file.") from None
