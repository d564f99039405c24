"""An adapter on disk: finding it in an output directory and reading it without its base model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import Tensor

import loratlas
from loratlas.engine.folder import PREFIX, read_config, read_tensors
from loratlas.errors import UserError

__all__ = ["MODEL", "PREFIX", "AdapterFolder", "find_adapter", "find_whole_model", "read_adapter"]

MODEL = "model"  # in the folder of a run that trained the base model's own weights


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A PEFT adapter folder as read: config is adapter_config.json, tensors maps the file's names to CPU tensors."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def find_whole_model(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a whole model that `path` means: itself, or model/ in the folder of a run. None for an adapter."""
    for folder in (Path(path), Path(path) / MODEL):
        if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file():
            return folder
    return None


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """The adapter folder that `path` means: itself, or the only one below it (the output directory of a run).

    Raises:
        UserError: there is nothing at `path`, no adapter in it, or several (they are listed).
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"there is no directory {root}: give an adapter folder or the output directory of a run.")
    if (root / CONFIG_NAME).is_file():
        return root
    found = sorted({file.parent for file in root.rglob(CONFIG_NAME)}) if root.is_dir() else []
    # a trainer's checkpoints are copies of the adapter at earlier steps, hidden folders what a crash left half-written
    final = [
        folder
        for folder in found
        if not any("checkpoint" in part or part.startswith(".") for part in folder.relative_to(root).parts)
    ]
    whole = find_whole_model(root) if not final else None
    if whole is not None:
        raise UserError(
            f"{whole} is a whole model, not an adapter: from_pretrained of transformers loads it as it is, and it has "
            "no LoRA form."
        )
    if not final:
        raise UserError(f"{root} holds no adapter ({CONFIG_NAME} is missing): give a folder that PEFT has saved.")
    if len(final) > 1:
        raise UserError(f"{root} holds several adapters, choose one of: {', '.join(map(str, final))}.")
    return final[0]


def read_adapter(path: str | os.PathLike[str]) -> AdapterFolder:
    """Read the adapter that `find_adapter` finds at `path`.

    Raises:
        UserError: no adapter there, a config that is not JSON or names no method, tensors missing, damaged, or in a
            pickle (which could run code and is never opened).
    """
    loratlas.register_adapters()  # what the file's tensors are is known to their method
    directory = find_adapter(path)
    return AdapterFolder(directory, read_config(directory), read_tensors(directory))
