"""An adapter on disk: finding it in an output directory and reading it without its base model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

import loratlas
from loratlas.engine.config import check_safetensors
from loratlas.errors import UserError

PREFIX = "base_model.model."


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
    # a trainer's checkpoints are copies of the adapter at earlier steps
    final = [folder for folder in found if not any("checkpoint" in part for part in folder.relative_to(root).parts)]
    if not final:
        raise UserError(f"{root} holds no adapter ({CONFIG_NAME} is missing): give a folder that PEFT has saved.")
    if len(final) > 1:
        raise UserError(f"{root} holds several adapters, choose one of: {', '.join(map(str, final))}.")
    return final[0]


def read_adapter(path: str | os.PathLike[str]) -> AdapterFolder:
    """Read the adapter that `find_adapter` finds at `path`.

    Raises:
        UserError: no adapter there, a config that is not JSON or names no method, tensors missing, cut short, or in a
            pickle (which could run code and is never opened).
    """
    loratlas.register_adapters()  # what the file's tensors are is known to their method
    directory = find_adapter(path)
    config = _read_config(directory / CONFIG_NAME)
    weights = directory / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickled = directory / WEIGHTS_NAME
        if pickled.is_file():
            raise UserError(f"{pickled} is a pickle and is not opened: save the adapter again as safetensors.")
        raise UserError(f"{directory} has a config but no tensors ({SAFETENSORS_WEIGHTS_NAME} is missing).")
    check_safetensors(weights)
    return AdapterFolder(directory, config, load_file(weights))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): save or copy the adapter again.") from None
    if not isinstance(config, dict) or not config.get("peft_type"):
        raise UserError(f"{file} names no peft_type, so the adapter's method is unknown: is it an adapter of PEFT?")
    return config
