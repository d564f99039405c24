"""An adapter folder as bytes on disk: its config as a dictionary and its tensors, read with care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from loratlas.engine.config import check_tensors
from loratlas.errors import UserError

PREFIX = "base_model.model."  # PEFT puts it before every module path


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder.

    Raises:
        UserError: it is missing, is not JSON or names no method.
    """
    file = directory / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{directory} holds no adapter ({CONFIG_NAME} is missing): give a folder that PEFT has saved.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): save or copy the adapter again.") from None
    if not isinstance(config, dict) or not config.get("peft_type"):
        raise UserError(f"{file} names no peft_type, so the adapter's method is unknown: is it an adapter of PEFT?")
    return config


def read_tensors(directory: Path, name: str = SAFETENSORS_WEIGHTS_NAME) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU.

    Raises:
        UserError: missing, damaged, or in a pickle (which could run code and is never opened).
    """
    weights = directory / name
    if not weights.is_file():
        pickled = directory / WEIGHTS_NAME
        if pickled.is_file():
            raise UserError(f"{pickled} is a pickle and is not opened: save the adapter again as safetensors.")
        raise UserError(f"{directory} has a config but no tensors ({name} is missing).")
    # the checksum in the config is of the adapter's tensors, not of others that lie beside them
    recorded = name == SAFETENSORS_WEIGHTS_NAME and (directory / CONFIG_NAME).is_file()
    check_tensors(weights, read_config(directory).get("tensors_sha256") if recorded else None)
    return load_file(weights)
