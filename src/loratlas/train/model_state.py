"""The trained part of a PEFT model: its adapters as PEFT saves them, and what trains beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from loratlas.errors import UserError
from loratlas.train.state import read_state, write_state

BESIDE = "beside"

# what the same adapter may have otherwise when it is built again: where its base lies, and what saving itself sets
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "initialized",
    "peft_version",
    "revision",
    "runtime_config",
    "tensors_sha256",
}


def write_model(folder: Path, model: PeftModel) -> None:
    """Save all adapters of `model` into `folder`, and the tensors that training changes and PEFT leaves out."""
    model.save_pretrained(str(folder))
    beside = _beside(model)
    if beside:
        write_state(folder, BESIDE, beside)


def read_model(folder: Path, model: PeftModel) -> None:
    """Load what `write_model` saved into the adapters of `model`, in place.

    Raises:
        UserError: an adapter is not in `folder`, was configured otherwise, or does not fit this model.
    """
    check_configs(folder, model)
    with fitting(folder):
        for name in model.peft_config:
            # not model.load_adapter: it would cast adapters that were asked to train in bf16
            weights = load_peft_weights(str(_home(folder, name)), device="cpu")
            set_peft_model_state_dict(model, weights, adapter_name=name)
    _read_beside(folder, model)


def check_configs(folder: Path, model: PeftModel) -> None:
    """Raise `UserError` where the adapters of `model` are not those of `folder`; the fields are named."""
    for name, config in model.peft_config.items():
        file = _home(folder, name) / CONFIG_NAME
        if not file.is_file():
            raise UserError(f"{folder} has no adapter {name!r}: it was saved from a model with other adapters.")
        old, new = json.loads(file.read_text(encoding="utf-8")), _plain(config.to_dict())
        changed = sorted(key for key in (old.keys() & new.keys()) - _FREE if _plain(old[key]) != new[key])
        if changed:
            what = ", ".join(f"{key} was {_plain(old[key])!r} and is {new[key]!r}" for key in changed)
            raise UserError(f"{folder} was saved with another configuration of adapter {name!r}: {what}.")


def _read_beside(folder: Path, model: PeftModel) -> None:
    """Load the tensors that PEFT left out, if any were saved."""
    if not (folder / f"{BESIDE}.json").is_file():
        return
    saved, there = read_state(folder, BESIDE), dict(_tensors(model))
    with torch.no_grad(), fitting(folder):
        for name, value in saved.items():
            if name not in there:
                raise UserError(f"{folder} has a trained tensor {name}, which this model does not: build it as before.")
            there[name].copy_(value)


def _beside(model: PeftModel) -> dict[str, Tensor]:
    """Trainable parameters outside the adapters, and the running statistics of normalisation layers."""
    saved = {
        tensor.untyped_storage().data_ptr()
        for name in model.peft_config
        for tensor in get_peft_model_state_dict(model, adapter_name=name).values()
    }
    statistics = {
        id(buffer) for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers(False)
    }
    return {
        name: tensor.detach()
        for name, tensor in _tensors(model)
        if (id(tensor) in statistics or tensor.requires_grad) and tensor.untyped_storage().data_ptr() not in saved
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _home(folder: Path, adapter: str) -> Path:
    return folder if adapter == "default" else folder / adapter


def _plain(value: Any) -> Any:
    """As JSON gives it back. Lists of names are sets: PEFT adds to them again whenever a config object is used."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        items = [_plain(item) for item in value]
        return sorted(set(items)) if all(isinstance(item, str) for item in items) else items
    return value if value is None or isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Errors of torch and PEFT about tensors that do not fit, with the checkpoint's name."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder} does not fit this model: {' '.join(str(error).split())[:300]}") from None
