"""The weight update of each adapted layer, rebuilt as thin factors from an adapter's file alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor

from loratlas.analysis.adapter_folder import PREFIX, AdapterFolder
from loratlas.engine.method import LowRankMethod, Method
from loratlas.linalg.lowrank import Pair


class NeedsBaseModel(Exception):
    """A method asked for something that only the adapted layer itself has."""


class StoredView:
    """One layer's tensors as the file has them; what `Method.exported` needs of `engine.method.View`."""

    def __init__(self, cfg: Any, r: int, scaling: float, tensors: dict[str, Tensor]) -> None:
        self.cfg = cfg
        self.r = r
        self.scaling = scaling
        self.tensors = tensors

    def __getattr__(self, name: str) -> Tensor | None:
        if name in ("op", "layer", "adapter"):
            raise NeedsBaseModel(name)
        return self.tensors.get(name)


def method_of(folder: AdapterFolder) -> Method | None:
    """Our method that wrote the adapter; None for PEFT's own methods and for unknown ones."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(folder.config["peft_type"])
    return getattr(tuner, "method", None)


def tensor_prefix(folder: AdapterFolder) -> str | None:
    """What PEFT puts before the adapter's own tensor names; None for a method that this installation does not know."""
    return PEFT_TYPE_TO_PREFIX_MAPPING.get(folder.config["peft_type"])


def layer_tensors(folder: AdapterFolder) -> dict[str, dict[str, Tensor]]:
    """{module path: {tensor name without prefix: tensor}} of the adapter's own tensors."""
    prefix = tensor_prefix(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in folder.tensors.items():
        module, found, name = key.partition(f".{prefix}")
        if prefix and found:
            layers.setdefault(module.removeprefix(PREFIX), {})[name.removesuffix(".weight")] = tensor
    return layers


def layer_updates(folder: AdapterFolder) -> Iterator[tuple[str, int, Pair | None]]:
    """(module path, rank r, update as (up (out, k), down (k, in))) of every adapted layer, in the order of the file.

    The update is None for methods that change W by more than a sum of thin products (DoRA, multiplicative methods), for
    those that need the base model to say it, and for PEFT's methods other than LoRA.
    """
    cfg, method = folder.config, method_of(folder)
    own_config: Any = None
    if method is not None:
        own_config = PEFT_TYPE_TO_CONFIG_MAPPING[cfg["peft_type"]].from_pretrained(str(folder.directory))
    for module, tensors in layer_tensors(folder).items():
        r = _of_layer(cfg, "rank_pattern", module, cfg.get("r") or 0)
        alpha = _of_layer(cfg, "alpha_pattern", module, cfg.get("lora_alpha"))
        update = None
        if method is not None:
            update = _own_update(method, StoredView(own_config, r, method.scale(own_config, r, alpha), tensors))
        elif cfg["peft_type"] == "LORA" and not cfg.get("use_dora"):
            update = _lora_update(tensors, alpha / (r**0.5 if cfg.get("use_rslora") else r))
        yield module, r, update


def _of_layer(config: dict[str, Any], pattern: str, module: str, default: Any) -> Any:
    """The value that `rank_pattern` or `alpha_pattern` gives to `module`, as PEFT matches it."""
    patterns = config.get(pattern) or {}
    return patterns.get(get_pattern_key(list(patterns), module), default)


def _own_update(method: Method, view: Any) -> Pair | None:
    if not isinstance(method, LowRankMethod):
        return None
    try:
        down, up = method.exported(view).joined()
    except NeedsBaseModel:
        return None
    return up, down


def _lora_update(tensors: dict[str, Tensor], scaling: float) -> Pair | None:
    """scaling * B A of a stock LoRA layer; convolutions count as (out, in * kh * kw) matrices."""
    down, up = (tensors.get(name, tensors.get(f"embedding_{name}")) for name in ("A", "B"))
    if down is None or up is None:
        return None
    return up.flatten(1) * scaling, down.flatten(1)
