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

__all__ = ["PREFIX", "AdapterFolder", "find_adapter", "read_adapter"]


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A PEFT adapter folder as read: config is adapter_config.json, tensors maps the file's names to CPU tensors."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


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
