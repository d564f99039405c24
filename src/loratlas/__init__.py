"""LoRAtlas: parameter-efficient fine-tuning methods of the literature, native to Hugging Face PEFT.

Importing the package makes every adapter type known to PEFT. Only under the `loratlas` command that waits until a
command needs it, so that `loratlas --help` does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratlas.adapters.lamda import LamdaConfig
    from loratlas.adapters.load_lora import load_lora
    from loratlas.adapters.loldu import LoLDUConfig
    from loratlas.adapters.lora import AtlasLoraConfig
    from loratlas.adapters.lora_ga import LoraGAConfig
    from loratlas.adapters.lora_sb import LoraSBConfig, LoraXSConfig
    from loratlas.adapters.nlora import NLoraConfig
    from loratlas.adapters.salt import SaltConfig
    from loratlas.adapters.soka import SoKAConfig
    from loratlas.adapters.srlora import SRLoraConfig
    from loratlas.adapters.svfit import SVFitConfig
    from loratlas.engine.calibrate import calibrate
    from loratlas.engine.lifecycle import Lifecycle, LifecycleCallback, attach
    from loratlas.errors import UserError
    from loratlas.optim.dct_adamw import DCTAdamW, DCTAdamWConfig
    from loratlas.optim.fira import FiraAdamW, FiraConfig, FiraRMSProp
    from loratlas.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig
    from loratlas.train.atomic import AtomicCheckpoints
    from loratlas.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "AtlasLoraConfig",
    "AtomicCheckpoints",
    "DCTAdamW",
    "DCTAdamWConfig",
    "FiraAdamW",
    "FiraConfig",
    "FiraRMSProp",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreConfig",
    "LamdaConfig",
    "Lifecycle",
    "LifecycleCallback",
    "LoLDUConfig",
    "LoraGAConfig",
    "LoraSBConfig",
    "LoraXSConfig",
    "NLoraConfig",
    "SRLoraConfig",
    "SVFitConfig",
    "SaltConfig",
    "SoKAConfig",
    "UserError",
    "__version__",
    "attach",
    "calibrate",
    "load_checkpoint",
    "load_lora",
    "newest_checkpoint",
    "save_checkpoint",
]

_HOMES = {
    "AtlasLoraConfig": "loratlas.adapters.lora",
    "LoLDUConfig": "loratlas.adapters.loldu",
    "LoraGAConfig": "loratlas.adapters.lora_ga",
    "LamdaConfig": "loratlas.adapters.lamda",
    "LoraSBConfig": "loratlas.adapters.lora_sb",
    "LoraXSConfig": "loratlas.adapters.lora_sb",
    "NLoraConfig": "loratlas.adapters.nlora",
    "SRLoraConfig": "loratlas.adapters.srlora",
    "SaltConfig": "loratlas.adapters.salt",
    "SoKAConfig": "loratlas.adapters.soka",
    "Lifecycle": "loratlas.engine.lifecycle",
    "LifecycleCallback": "loratlas.engine.lifecycle",
    "attach": "loratlas.engine.lifecycle",
    "load_lora": "loratlas.adapters.load_lora",
    "SVFitConfig": "loratlas.adapters.svfit",
    "calibrate": "loratlas.engine.calibrate",
    "DCTAdamW": "loratlas.optim.dct_adamw",
    "DCTAdamWConfig": "loratlas.optim.dct_adamw",
    "FiraAdamW": "loratlas.optim.fira",
    "FiraConfig": "loratlas.optim.fira",
    "FiraRMSProp": "loratlas.optim.fira",
    "GaLoreAdafactor": "loratlas.optim.galore",
    "GaLoreAdamW": "loratlas.optim.galore",
    "GaLoreAdamW8bit": "loratlas.optim.galore",
    "GaLoreConfig": "loratlas.optim.galore",
    "UserError": "loratlas.errors",
    "AtomicCheckpoints": "loratlas.train.atomic",
    "load_checkpoint": "loratlas.train.checkpoint",
    "newest_checkpoint": "loratlas.train.checkpoint",
    "save_checkpoint": "loratlas.train.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def register_adapters() -> None:
    """Make every adapter type of the library known to PEFT; `import loratlas` does it."""
    for home in sorted(set(_HOMES.values())):
        if not home.startswith("loratlas.train."):  # no adapters there, and transformers' Trainer takes its time
            importlib.import_module(home)


if "loratlas_command" not in sys.modules:
    register_adapters()
