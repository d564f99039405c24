"""LoRAtlas: parameter-efficient fine-tuning methods of the literature, native to Hugging Face PEFT.

Importing the package makes every adapter type known to PEFT. Only under the `loratlas` command that waits until a
command needs it, so that `loratlas --help` does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratlas.adapters.allora import ALLoraConfig
    from loratlas.adapters.block_lora import BlockLoraConfig
    from loratlas.adapters.bone import AtlasMissConfig, BoneConfig
    from loratlas.adapters.codyra import CoDyRAConfig
    from loratlas.adapters.diffora import DiffoRAConfig
    from loratlas.adapters.dylora import DyLoraConfig, set_rank
    from loratlas.adapters.hydra import HydraConfig
    from loratlas.adapters.increlora import IncreLoraConfig
    from loratlas.adapters.lamda import LamdaConfig
    from loratlas.adapters.load_lora import load_lora
    from loratlas.adapters.loldu import LoLDUConfig
    from loratlas.adapters.lora import AtlasLoraConfig
    from loratlas.adapters.lora_ga import LoraGAConfig
    from loratlas.adapters.lora_sb import LoraSBConfig, LoraXSConfig
    from loratlas.adapters.nlora import NLoraConfig
    from loratlas.adapters.nola import NolaConfig
    from loratlas.adapters.randlora import RandLoraConfig
    from loratlas.adapters.salt import SaltConfig
    from loratlas.adapters.sltrain import SLTrainConfig, SLTrainLinear, replace_linears
    from loratlas.adapters.soka import SoKAConfig
    from loratlas.adapters.sora import SoRAConfig
    from loratlas.adapters.srlora import SRLoraConfig
    from loratlas.adapters.svfit import SVFitConfig
    from loratlas.adapters.tlora import TLoraConfig
    from loratlas.adapters.triadaptlora import TriAdaptLoraConfig
    from loratlas.adapters.wara import WaRAConfig
    from loratlas.engine.calibrate import calibrate
    from loratlas.engine.lifecycle import Lifecycle, LifecycleCallback, attach
    from loratlas.engine.relative_fisher import relative_fisher
    from loratlas.errors import UserError
    from loratlas.objectives.ba_lora import BALoraConfig
    from loratlas.objectives.loku import LoKUConfig
    from loratlas.objectives.pairing import PairCollator, PairedData
    from loratlas.optim.dct_adamw import DCTAdamW, DCTAdamWConfig
    from loratlas.optim.fira import FiraAdamW, FiraConfig, FiraRMSProp
    from loratlas.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig
    from loratlas.optim.lora_ggpo import LoraGgpoConfig, PerturbedAdamW
    from loratlas.optim.lora_plus import LoraPlusConfig, lora_plus
    from loratlas.optim.lora_pro import LoraPro, LoraProConfig
    from loratlas.strategies.lisa import LisaCallback, LisaConfig
    from loratlas.strategies.lt_sft import LtSftCallback, LtSftConfig
    from loratlas.strategies.sparse_delta import SparseDelta, compose_deltas
    from loratlas.train.atomic import AtomicCheckpoints
    from loratlas.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "ALLoraConfig",
    "AtlasLoraConfig",
    "AtlasMissConfig",
    "AtomicCheckpoints",
    "BALoraConfig",
    "BlockLoraConfig",
    "BoneConfig",
    "CoDyRAConfig",
    "DCTAdamW",
    "DCTAdamWConfig",
    "DiffoRAConfig",
    "DyLoraConfig",
    "FiraAdamW",
    "FiraConfig",
    "FiraRMSProp",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreConfig",
    "HydraConfig",
    "IncreLoraConfig",
    "LamdaConfig",
    "Lifecycle",
    "LifecycleCallback",
    "LisaCallback",
    "LisaConfig",
    "LoKUConfig",
    "LoLDUConfig",
    "LoraGAConfig",
    "LoraGgpoConfig",
    "LoraPlusConfig",
    "LoraPro",
    "LoraProConfig",
    "LoraSBConfig",
    "LoraXSConfig",
    "LtSftCallback",
    "LtSftConfig",
    "NLoraConfig",
    "NolaConfig",
    "PairCollator",
    "PairedData",
    "PerturbedAdamW",
    "RandLoraConfig",
    "SLTrainConfig",
    "SLTrainLinear",
    "SRLoraConfig",
    "SVFitConfig",
    "SaltConfig",
    "SoKAConfig",
    "SoRAConfig",
    "SparseDelta",
    "TLoraConfig",
    "TriAdaptLoraConfig",
    "UserError",
    "WaRAConfig",
    "__version__",
    "attach",
    "calibrate",
    "compose_deltas",
    "load_checkpoint",
    "load_lora",
    "lora_plus",
    "newest_checkpoint",
    "relative_fisher",
    "replace_linears",
    "save_checkpoint",
    "set_rank",
]

_HOMES = {
    "ALLoraConfig": "loratlas.adapters.allora",
    "DyLoraConfig": "loratlas.adapters.dylora",
    "set_rank": "loratlas.adapters.dylora",
    "AtlasLoraConfig": "loratlas.adapters.lora",
    "AtlasMissConfig": "loratlas.adapters.bone",
    "BlockLoraConfig": "loratlas.adapters.block_lora",
    "BoneConfig": "loratlas.adapters.bone",
    "CoDyRAConfig": "loratlas.adapters.codyra",
    "DiffoRAConfig": "loratlas.adapters.diffora",
    "LoLDUConfig": "loratlas.adapters.loldu",
    "LoraGAConfig": "loratlas.adapters.lora_ga",
    "HydraConfig": "loratlas.adapters.hydra",
    "IncreLoraConfig": "loratlas.adapters.increlora",
    "LamdaConfig": "loratlas.adapters.lamda",
    "LoraSBConfig": "loratlas.adapters.lora_sb",
    "LoraXSConfig": "loratlas.adapters.lora_sb",
    "NLoraConfig": "loratlas.adapters.nlora",
    "NolaConfig": "loratlas.adapters.nola",
    "RandLoraConfig": "loratlas.adapters.randlora",
    "SLTrainConfig": "loratlas.adapters.sltrain",
    "SLTrainLinear": "loratlas.adapters.sltrain",
    "replace_linears": "loratlas.adapters.sltrain",
    "SRLoraConfig": "loratlas.adapters.srlora",
    "SaltConfig": "loratlas.adapters.salt",
    "SoKAConfig": "loratlas.adapters.soka",
    "SoRAConfig": "loratlas.adapters.sora",
    "Lifecycle": "loratlas.engine.lifecycle",
    "LifecycleCallback": "loratlas.engine.lifecycle",
    "attach": "loratlas.engine.lifecycle",
    "LoraGgpoConfig": "loratlas.optim.lora_ggpo",
    "PerturbedAdamW": "loratlas.optim.lora_ggpo",
    "LoraPlusConfig": "loratlas.optim.lora_plus",
    "lora_plus": "loratlas.optim.lora_plus",
    "LoraPro": "loratlas.optim.lora_pro",
    "LoraProConfig": "loratlas.optim.lora_pro",
    "load_lora": "loratlas.adapters.load_lora",
    "SVFitConfig": "loratlas.adapters.svfit",
    "WaRAConfig": "loratlas.adapters.wara",
    "TLoraConfig": "loratlas.adapters.tlora",
    "TriAdaptLoraConfig": "loratlas.adapters.triadaptlora",
    "calibrate": "loratlas.engine.calibrate",
    "relative_fisher": "loratlas.engine.relative_fisher",
    "BALoraConfig": "loratlas.objectives.ba_lora",
    "LoKUConfig": "loratlas.objectives.loku",
    "PairCollator": "loratlas.objectives.pairing",
    "PairedData": "loratlas.objectives.pairing",
    "LisaCallback": "loratlas.strategies.lisa",
    "LisaConfig": "loratlas.strategies.lisa",
    "LtSftCallback": "loratlas.strategies.lt_sft",
    "LtSftConfig": "loratlas.strategies.lt_sft",
    "SparseDelta": "loratlas.strategies.sparse_delta",
    "compose_deltas": "loratlas.strategies.sparse_delta",
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
        if home.startswith("loratlas.adapters."):
            importlib.import_module(home)


if "loratlas_command" not in sys.modules:
    register_adapters()
