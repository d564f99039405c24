"""Any LoRA that PEFT has saved, as an adapter of this library: to train on, combine, export or inspect.

lora_alpha / r, patterns, rsLoRA, trained biases, modules_to_save   are mapped
DoRA, bias of lora_B, layer replication, ...                        are refused, by the name of their field
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from loratlas.adapters.lora import AtlasLoraConfig
from loratlas.engine.folder import PREFIX, read_config, read_tensors
from loratlas.errors import UserError

_SAME = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "use_rslora",
    "task_type",
    "base_model_name_or_path",
    "revision",
)
# says nothing about what a saved adapter computes
_IDLE = (
    "auto_mapping",
    "peft_type",
    "peft_version",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "bias",
    "init_lora_weights",
)
# the other starts rewrite the base's weights whenever PEFT loads the adapter
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?:embedding_(?P<e>[AB])|(?P<w>[AB])\.weight)")


def load_lora(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default", *, is_trainable: bool = False
) -> PeftModel:
    """Load a LoRA folder of PEFT onto `model` as an `AtlasLoraConfig` adapter; the same function to rounding.

    Linear, Conv1D, Conv2d and embedding layers. Loading is strict: every tensor of the file must have its place and
    every place its tensor.

    Args:
        model: the base model, or a PeftModel with adapters of `AtlasLoraConfig`, to which one more is added
            (inactive, as in PEFT's load_adapter).
        directory: a folder with adapter_config.json and adapter_model.safetensors.
        is_trainable: whether training goes on from it, as in PEFT.

    Raises:
        UserError: not a LoRA, a field of its config that has no counterpart here, tensors that are missing or have no
            place (with the counts), or base weights in the file that differ from the model's. `model` is then as it
            was before.
    """
    folder = Path(directory)
    config = _config(folder, is_trainable)
    saved = _renamed(read_tensors(folder))
    fresh = not isinstance(model, PeftModel)
    if not fresh and adapter_name in model.peft_config:  # type: ignore[operator]
        raise UserError(f"the model has an adapter {adapter_name!r} already: give another adapter_name.")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    result: Any = None
    try:
        result = _with_adapter(model, config, adapter_name)
        expected = get_peft_model_state_dict(result, adapter_name=adapter_name, save_embedding_layers=False)
        surplus = _without_own_weights(result, {name: t for name, t in saved.items() if name not in expected})
        _require_match(folder / SAFETENSORS_WEIGHTS_NAME, set(expected), set(saved), surplus)
        set_peft_model_state_dict(result, {name: saved[name] for name in expected}, adapter_name)
    except BaseException:
        if result is not None:
            result.unload() if fresh else result.delete_adapter(adapter_name)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        raise
    if not is_trainable:
        result.eval()
    elif not fresh:
        result.set_requires_grad(adapter_name)
    return result


def _with_adapter(model: nn.Module, config: AtlasLoraConfig, adapter_name: str) -> Any:
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        return model
    return get_peft_model(model, config, adapter_name)


def _config(folder: Path, is_trainable: bool) -> AtlasLoraConfig:
    file, values = folder / CONFIG_NAME, read_config(folder)
    if values["peft_type"] != "LORA":
        raise UserError(f"{file}: peft_type is {values['peft_type']}, not LORA; PeftModel.from_pretrained loads it.")
    for name, value in values.items():
        if value and name not in _SAME + _IDLE:
            raise UserError(
                f"{file}: {name} is {value!r}, for which plain LoRA has no place; load it with PEFT itself."
            )
    start = values.get("init_lora_weights")
    if start not in _STARTS:
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, with which PEFT rewrites the base's weights; save it with "
            "path_initial_model_for_weight_conversion, as a LoRA on the original weights, and load that."
        )
    given = {name: values[name] for name in _SAME if values.get(name) is not None}
    bias = str(values.get("bias") or "none").replace("lora_only", "atlas_only")
    return AtlasLoraConfig(**given, bias=bias, initialized=True, inference_mode=not is_trainable)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors under our names, as matrices; everything else as it is."""
    renamed = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            renamed[name] = tensor
        else:
            factor = match["e"] or match["w"]
            # of a convolution (r, in, kh, kw) and (out, r, 1, 1); of other layers already matrices
            renamed[f"{PREFIX}{match['path']}.ATLAS_LORA_{factor}"] = tensor.flatten(1)
    return renamed


def _without_own_weights(model: PeftModel, surplus: Mapping[str, Tensor]) -> list[str]:
    """Names of `surplus` without the copies of base weights that PEFT saves beside adapted or resized embeddings."""
    state = model.state_dict() if surplus else {}
    left = []
    for name, tensor in surplus.items():
        own = state.get(name)
        if own is None:
            left.append(name)
        elif own.shape != tensor.shape or not torch.equal(own.cpu(), tensor.to(own.dtype)):
            raise UserError(
                f"the adapter's file brings base weights of its own ({name.removeprefix(PREFIX)}), which differ from "
                "the model's: load the base model that it was trained on, with its vocabulary."
            )
    return left


def _require_match(file: Path, expected: set[str], found: set[str], surplus: list[str]) -> None:
    missing = sorted(expected - found)
    if not missing and not surplus:
        return
    counts = f"matched {len(expected & found)}, missing {len(missing)}, unexpected {len(surplus)}"
    first = f"the first missing is {missing[0]}" if missing else f"the first unexpected is {surplus[0]}"
    what = "fits this model only in part" if expected & found else "has no tensor that fits this model"
    raise UserError(
        f"{file} {what} ({counts}; {first}): load it on the base model and with the adapter_config.json it was trained "
        "with."
    )
