"""What serving engines read of a LoRA folder, and a check of a folder that needs none of them installed.

They know a part of PEFT's config: one rank, one alpha, no patterns, no trained biases, no modules saved along. vLLM and
SGLang take PEFT's own names, diffusers wants the pipeline's component (`unet.`, `transformer.`) in their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from loratlas.engine.folder import read_config, read_tensors
from loratlas.errors import UserError

SERVERS = ("vllm", "sglang", "diffusers")
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # diffusers takes it before any other file of a folder

_MAX_LORA_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allows for --max-lora-rank
_PEFT_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(embedding_[AB]|[AB]\.weight)")
_DIFFUSERS_NAME = re.compile(rf"({'|'.join(COMPONENTS)})\.(?P<path>.+)\.lora_[AB]\.weight")

# fields that servers ignore or refuse, with the value that they take as given
_FIXED: dict[str, tuple[Any, str]] = {
    "bias": ("none", "trained biases have no place in a served LoRA, export merged weights instead"),
    "modules_to_save": (None, "servers load no saved modules, export with heads beside (--heads beside)"),
    "rank_pattern": ({}, "servers know one rank, pad all modules to the largest"),
    "alpha_pattern": ({}, "servers know one alpha, fold the scaling into B"),
    "use_rslora": (False, "not every server reads it, fold the scaling into B"),
    "use_dora": (False, "servers have no DoRA, export merged weights instead"),
    "lora_bias": (False, "servers have no bias of lora_B, export merged weights instead"),
}


def padded_rank(rank: int) -> int:
    """The rank to pad to with zeros: the next of 8, 16, 32, 64, 128, 256, 320, 512; above that `rank` itself."""
    return next((size for size in _MAX_LORA_RANK[1:] if size >= rank), rank)


def max_lora_rank(rank: int) -> int | None:
    """The least value for vLLM's --max-lora-rank with which `rank` is served; None above 512, which no value allows."""
    return next((size for size in _MAX_LORA_RANK if size >= rank), None)


def check_folder(directory: str | os.PathLike[str], server: str) -> list[str]:
    """Every point on which `server` would refuse or misread the LoRA in `directory`; empty if there is none.

    Each point names the field or the tensor. The server is not needed for it: what is checked is the format.

    Args:
        directory: a LoRA folder, exported here or saved by PEFT.
        server: "vllm", "sglang" or "diffusers".

    Raises:
        UserError: an unknown server, or no readable adapter in `directory`.
    """
    folder = Path(directory)
    if server not in SERVERS:
        raise UserError(f"there is no check for {server!r}; there is one for {', '.join(SERVERS)}.")
    if server != "diffusers":
        config = read_config(folder)
        return [*_config_faults(config, server), *_tensor_faults(read_tensors(folder), config, _PEFT_NAME)]
    # a file alone is a LoRA for diffusers
    config = read_config(folder) if (folder / CONFIG_NAME).is_file() else {}
    if not (folder / DIFFUSERS_WEIGHTS_NAME).is_file():
        return [*_config_faults(config, server), f"{DIFFUSERS_WEIGHTS_NAME} is missing: export with a component"]
    tensors = read_tensors(folder, DIFFUSERS_WEIGHTS_NAME)
    return [*_config_faults(config, server), *_tensor_faults(tensors, config, _DIFFUSERS_NAME)]


def require_accepted(directory: str | os.PathLike[str], server: str) -> None:
    """Raise one `UserError` with all points of `check_folder`, if there are any."""
    faults = check_folder(directory, server)
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UserError(f"{server} would not serve this LoRA, {len(faults)} of its points fail:{listed}")


def _config_faults(config: Mapping[str, Any], server: str) -> Iterator[str]:
    if not config:
        return
    if config["peft_type"] != "LORA":
        yield f"peft_type is {config['peft_type']}, not LORA: export it as a LoRA first"
    for name in ("r", "lora_alpha", "target_modules"):
        if not config.get(name):
            yield f"{name} is missing in {CONFIG_NAME}"
    for name, (fixed, reason) in _FIXED.items():
        value = config.get(name)
        if value and value != fixed:
            yield f"{name} is {value!r}: {reason}"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if server == "vllm" and isinstance(rank, int) and max_lora_rank(rank) is None:
        yield f"r is {rank}, above the {_MAX_LORA_RANK[-1]} that --max-lora-rank allows: export with a smaller rank"
    if server == "diffusers" and rank != alpha:
        yield f"lora_alpha is {alpha} and r is {rank}: diffusers takes alpha = r, fold the scaling into B"
    if isinstance(config.get("target_modules"), str):
        yield f"target_modules is the pattern {config['target_modules']!r}: servers want a list of names"


def _tensor_faults(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name_form: re.Pattern[str]) -> list[str]:
    if not tensors:
        return ["the file holds no tensors"]
    faults, paths = [], {}
    for name, tensor in tensors.items():
        match = name_form.fullmatch(name)
        if match is None:
            faults.append(f"{name} is not the name of a LoRA tensor that the server reads")
            continue
        paths[name] = match["path"]
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            faults.append(f"{name} holds numbers that are not finite, or no floating-point numbers")
    faults += _rank_faults({name: tensors[name] for name in paths}, config.get("r"))
    targets = config.get("target_modules")
    if isinstance(targets, list):
        faults += _target_faults(paths, targets)
    return faults


def _rank_faults(tensors: Mapping[str, Tensor], rank: int | None) -> Iterator[str]:
    """A without its B, and factors of another rank than the config's (without one, than the first A's)."""
    for name, tensor in tensors.items():
        is_down = name.endswith(("A", "A.weight"))
        other = _partner(name)
        if other not in tensors:
            yield f"{other} is missing beside {name}"
        if tensor.dim() < 2:
            yield f"{name} has {tensor.dim()} dimensions instead of at least 2"
            continue
        own = tensor.shape[0 if is_down else 1]
        rank = own if rank is None else rank
        if own != rank:
            yield f"{name} has rank {own}, but all modules need the rank {rank}"


def _target_faults(paths: Mapping[str, str], targets: list[str]) -> Iterator[str]:
    """Modules that the config does not name, and names without tensors: servers load neither, and say nothing."""

    def matches(path: str, target: str) -> bool:
        return path == target or path.endswith(f".{target}")

    for name, path in paths.items():
        if not any(matches(path, target) for target in targets):
            yield f"{name} belongs to no entry of target_modules"
    found: Iterable[str] = set(paths.values())
    for target in targets:
        if not any(matches(path, target) for path in found):
            yield f"target_modules names {target}, but the file has no tensor for it"


def _partner(name: str) -> str:
    stem = name.removesuffix(".weight")
    return f"{stem[:-1]}{'B' if stem.endswith('A') else 'A'}{name[len(stem) :]}"
