"""Shipping an adapter: as a plain LoRA that stock PEFT loads without this library, or as merged weights.

The plain LoRA has one rank for all modules (zero-padded), lora_alpha = r and the scaling folded into B, because
servers read no more than that of PEFT's config. Without `rank` it is exact: the low-rank methods hand out their own
factors.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from loratlas.engine.layer import AtlasLayer, joined_factors
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.errors import UserError
from loratlas.files import whole_directory
from loratlas.linalg.lowrank import compress, norm, pad

PREFIX = "base_model.model."


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    rank: rank of the LoRA, 0 for merged weights. relative_error: ||delta - exported||_F / ||delta||_F over all
    modules, 0 when nothing was cut. max_lora_rank: what a server must be told to accept.
    """

    directory: str
    kind: str
    rank: int
    relative_error: float
    max_lora_rank: int
    tensors: int


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ExportReport:
    """Write adapter `adapter_name` of `model` as a plain PEFT LoRA folder. Modules saved along (a classifier head)
    come too.

    Args:
        rank: largest rank; None means exact. A smaller one takes the best approximation of each module's update.
        dtype: dtype of the factors in the file.

    Raises:
        UserError: the model has no such adapter, the method has no LoRA form, or `directory` is a file.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, but it is {rank}.")
    factors, lost, total = {}, 0.0, 0.0
    for path, layer in _layers(model, adapter_name):
        down, up = _factors(path, layer, adapter_name)
        limit = min(*layer.op.shape, rank or math.inf)
        if down.shape[0] > limit:
            size = norm((up, down))
            packed = compress(up, down, rank=int(limit))
            down, up = packed.down, packed.up
            lost, total = lost + (packed.error * size) ** 2, total + size**2
        elif rank is not None:
            total += norm((up, down)) ** 2
        factors[path] = layer, down, up
    width = max(1, *(down.shape[0] for _, down, _ in factors.values()))
    tensors = {name: _for_file(t, t.dtype) for name, t in _other_tensors(model, adapter_name).items()}
    for path, (layer, down, up) in factors.items():
        up, down = pad(up, down, width)
        for name, tensor in _lora_tensors(path, layer, down, up).items():
            tensors[f"{PREFIX}{path}.{name}"] = _for_file(tensor, dtype)
    config = _lora_config(model, adapter_name, factors, width)
    with whole_directory(directory) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    error = math.sqrt(lost / total) if lost else 0.0
    return ExportReport(str(directory), "lora", width, error, width, len(tensors))


def export_merged(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> ExportReport:
    """Write the base model with the adapter merged into a copy of its weights; `model` itself is not touched.

    Raises:
        UserError: no such adapter, a quantised base (load it in full precision to merge), or `directory` is a file.
    """
    layers = dict(_layers(model, adapter_name))
    quantised = [path for path, layer in layers.items() if layer.quantization_backend is not None]
    if quantised:
        raise UserError(
            f"{quantised[0]} is quantised, and merging into quantised weights loses accuracy: load the base model in "
            "full precision (bfloat16 or float32), load the adapter on it, and export that."
        )
    twin: Any = copy.deepcopy(model)
    twin.set_adapter(adapter_name)  # takes out what is merged, and brings the adapter's own modules_to_save
    merged: Any = twin.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    with whole_directory(directory) as folder:
        if hasattr(merged, "save_pretrained"):
            merged.save_pretrained(folder)
        else:
            tensors = {name: _for_file(tensor, tensor.dtype) for name, tensor in merged.state_dict().items()}
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    return ExportReport(str(directory), "merged", 0, 0.0, 0, len(merged.state_dict()))


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, AtlasLayer]]:
    """(path in the base model, layer) of every module that carries `adapter`."""
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UserError(f"the model has no adapter {adapter!r} (adapters: {known}).")
    found = list(atlas_layers(model, adapter))
    if not found:
        raise UserError(
            f"adapter {adapter!r} is a {model.peft_config[adapter].peft_type} adapter of PEFT, not one of ours: it is "
            "already in its own format."
        )
    for path, layer in found:
        yield path.removeprefix(PREFIX), layer


def _factors(path: str, layer: AtlasLayer, adapter: str) -> tuple[Tensor, Tensor]:
    view = View(layer, adapter)
    factors = joined_factors(view)
    if factors is None:
        if not layer.method.additive:
            raise UserError(
                f"{layer.method.name} changes W by more than a sum, so {path} has no LoRA form: export merged weights "
                "instead."
            )
        with torch.no_grad():
            delta = layer.method.delta_weight(view)
        packed = compress(delta, torch.eye(delta.shape[1], dtype=delta.dtype, device=delta.device))
        return packed.down, packed.up
    return factors


def _lora_tensors(path: str, layer: AtlasLayer, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    try:
        return layer.op.lora_tensors(down, up)
    except UserError as error:
        raise UserError(f"module {path}: {error}") from None


def _other_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What the adapter's file holds beside our tensors: modules_to_save and trained biases."""
    prefixes = {layer.prefix for _, layer in atlas_layers(model, adapter)}
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: value for name, value in state.items() if not any(f".{prefix}" in name for prefix in prefixes)}


def _lora_config(model: nn.Module, adapter: str, factors: dict[str, Any], rank: int) -> LoraConfig:
    ours: Any = model.peft_config[adapter]  # type: ignore[index]
    targets = sorted(factors)
    # PEFT matches names by their end: keep modules away that merely end like one of ours
    names = (name.removeprefix(PREFIX) for name, _ in model.named_modules())
    others = sorted({n for n in names if n not in factors and n.endswith(tuple(f".{t}" for t in targets))})
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        exclude_modules=others or None,
        modules_to_save=ours.modules_to_save,
        bias="lora_only" if ours.bias == "atlas_only" else ours.bias,
        fan_in_fan_out=all(layer.op.kind == "conv1d" for layer, _, _ in factors.values()),
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
    )


def _for_file(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Detached, on the CPU, with storage of its own: safetensors refuses views and shared memory."""
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=target).clone().contiguous()
