"""Makes PEFT know a method: a PeftType member, layer and model classes, and PEFT's mappings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from loratlas.engine.config import AtlasConfig
from loratlas.engine.layer import AtlasLayer
from loratlas.engine.method import Method
from loratlas.engine.model import AtlasModel

C = TypeVar("C", bound=type[AtlasConfig])


def adapter(method: Method) -> Callable[[C], C]:
    """Class decorator for a config: registers `method` with it as PEFT type ATLAS_<NAME>.

        @adapter(MyMethod())
        @dataclass
        class MyConfig(AtlasConfig): ...

    Raises:
        RuntimeError: another package has registered the same PEFT type or prefix.
    """

    def register(config_class: C) -> C:
        name = "atlas_" + method.name.replace("-", "_")
        peft_type = _peft_type(name.upper())
        taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if taken is not None and taken.__module__ != config_class.__module__:
            raise RuntimeError(f"PEFT type {name.upper()} is already registered by {taken.__module__}.")
        # Upper case, because third-party code takes every key with "lora_" in it for stock LoRA.
        # No underscore within, because PEFT looks for prefixes as substrings: that of lora may not occur in lora-xs's.
        prefix = "ATLAS_" + method.name.replace("-", "").upper() + "_"
        # named as the public class, so that saved configs and reprs read well
        stem = config_class.__name__.removesuffix("Config")
        family = type(f"{stem}Layer", (AtlasLayer,), {"method": method, "prefix": prefix})
        layers = {kind: _layer_class(stem, family, kind) for kind in method.kinds}
        known = {"method": method, "tuner_layer_cls": family, "layer_classes": layers, "prefix": prefix}
        model = type(f"{stem}Model", (AtlasModel,), {**known, "__doc__": AtlasModel.__doc__})
        if taken is not None:  # the module was reloaded
            for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
                mapping.pop(peft_type, None)
        if prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
            raise RuntimeError(f"the tensor prefix {prefix} is already used by another PEFT method.")
        _default_peft_type(config_class, peft_type)
        register_peft_method(name=name, config_cls=config_class, model_cls=model, prefix=prefix)
        return config_class

    return register


def _layer_class(stem: str, family: type[AtlasLayer], kind: str) -> type[AtlasLayer]:
    # PEFT's "all-linear" recognises adapted layers by "Linear" in the class name
    suffix = {"linear": "Linear", "conv1d": "Conv1DLinear", "conv2d": "Conv2d", "embedding": "Embedding"}[kind]
    return type(f"{stem}{suffix}", (family,), {"kind": kind})


def _default_peft_type(config_class: type[AtlasConfig], peft_type: PeftType) -> None:
    """Every instance carries its PEFT type, whatever was passed (as in PEFT's own configs)."""
    inherited = config_class.__post_init__

    def __post_init__(self: AtlasConfig) -> None:
        inherited(self)
        self.peft_type = peft_type

    config_class.__post_init__ = __post_init__  # type: ignore[method-assign]


def _peft_type(name: str) -> PeftType:
    """The member `name` of PeftType, added if it is not there.

    The enum is closed and PEFT offers no plug-in point. The member is built as Enum itself would build it; dispatch,
    JSON, iteration and look-ups by value and by name then work as for PEFT's own.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or PeftType[name] is not member or member not in list(PeftType):
        raise RuntimeError(f"this Python's Enum does not take new members: {name} could not be added to PeftType.")
    return member
