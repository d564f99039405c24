"""`AtlasConfig`: the fields that every adapter of the library shares. Names and meanings are PEFT's."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from loratlas.errors import UserError
from loratlas.files import sha256
from loratlas.linalg.svd import METHODS


def knob(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field whose help text the command line and the docs show."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help, **extra})
    return field(default=default, metadata={"help": help, **extra})


@dataclass
class AtlasConfig(PeftConfig):
    """Fields shared by all adapters. A method's config adds its own and sets `peft_type` through `registry.adapter`.

    Raises:
        UserError: a field is out of its range; the message names the field.
    """

    # whether r=None is allowed: as many directions as the method finds useful in a layer, at most min(out, in)
    rank_may_be_open: ClassVar[bool] = False

    r: int = knob(8, "Rank of the update: number of rank-one pairs that train in each layer.")
    lora_alpha: float | None = knob(None, "Numerator of the scaling alpha / r; None means alpha = r, a scaling of 1.")
    lora_dropout: float = knob(0.0, "Dropout on the input of the adapter branch.")
    target_modules: list[str] | str | None = knob(
        None, "Modules to adapt: name suffixes, a regular expression, or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = knob(None, "Modules to leave alone, given like target_modules.")
    layers_to_transform: list[int] | int | None = knob(None, "Adapt only the layers with these indices.")
    layers_pattern: list[str] | str | None = knob(None, "Name of the layer list that layers_to_transform indexes.")
    rank_pattern: dict[str, int] = knob({}, "Ranks of single modules: {name or regular expression: r}.")
    alpha_pattern: dict[str, float] = knob({}, "lora_alpha of single modules: {name or regular expression: alpha}.")
    modules_to_save: list[str] | None = knob(None, "Further modules that train in full and are saved along.")
    bias: str = knob("none", "Which biases train: 'none', 'all' or 'atlas_only' (those of the adapted layers).")
    init_weights: bool | str = knob(
        True, "True: the method's own start. False: a random start that changes the output (for tests)."
    )
    seed: int = knob(0, "Seed of every random choice that the method makes itself.")
    initialized: bool = knob(
        False, "Set in saved adapters: the tensors come from the file, so the start is not computed again."
    )
    requires_package: str = knob("loratlas", "Package to import before PEFT can load this adapter.")
    tensors_sha256: str | None = knob(None, "Set in saved adapters: checksum of adapter_model.safetensors.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # what `calibrate` gathered, {module: {statistic: tensor}}: needed once, so it is no field and is not saved
        self.calibration: dict[str, dict[str, Any]] | None = None
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        open_rank = self.r is None and self.rank_may_be_open
        self._require(open_rank or (isinstance(self.r, int) and self.r >= 1), "r", "an integer of at least 1")
        self._require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", "positive")
        ranks, alphas = (self.rank_pattern or {}).values(), (self.alpha_pattern or {}).values()
        self._require(all(isinstance(r, int) and r >= 1 for r in ranks), "rank_pattern", "a dict of ranks >= 1")
        self._require(all(alpha > 0 for alpha in alphas), "alpha_pattern", "a dict of positive numbers")
        self._require(0.0 <= self.lora_dropout < 1.0, "lora_dropout", "in [0, 1)")
        self._require(self.bias in ("none", "all", "atlas_only"), "bias", "'none', 'all' or 'atlas_only'")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern says where layers_to_transform counts: set layers_to_transform as well.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError("layers_to_transform needs target_modules to be a list of names, not a regular expression.")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise UserError(f"{type(self).__name__}: {name} must be {what}, but it is {value!r}.", field=name)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        # PEFT sets inference_mode while it saves a model with its tensors, and only then: a config saved alone must
        # still compute its start when it is used.
        before = self.initialized
        self.initialized = before or self.inference_mode
        # Of all who save configs only PEFT's PeftModel passes this, after it has written the tensors. transformers
        # writes them after the config, so there the file in the folder may be one that is about to be replaced.
        tensors = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if "auto_mapping_dict" in kwargs and os.path.isfile(tensors):
            self.tensors_sha256 = sha256(tensors)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.initialized, self.tensors_sha256 = before, None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        # PEFT reads the config first and the tensors long after: the one place where a damaged file can be named
        # before a model has been changed.
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        file, tensors = (os.path.join(folder, name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
        if os.path.isfile(file) and os.path.isfile(tensors):
            check_tensors(tensors, cls.from_json_file(file).get("tensors_sha256"))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.tensors_sha256 = None  # what trains from here on is no longer that file
        return config


@dataclass
class SvdConfig(AtlasConfig):
    """What the methods share whose start is a truncated SVD.

    Raises:
        UserError: a field is out of its range.
    """

    svd_method: str = knob("auto", "SVD of the start: 'auto', 'full', 'gram' or 'lowrank' (seeded, randomised).")
    svd_niter: int = knob(8, "Power iterations of svd_method='lowrank'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.svd_method in METHODS, "svd_method", f"one of {', '.join(METHODS)}")
        self._require(self.svd_niter >= 0, "svd_niter", "at least 0")

    def svd_options(self) -> dict[str, Any]:
        """Arguments of `linalg.factorise.usable_svd`."""
        return {"method": self.svd_method, "niter": self.svd_niter, "seed": self.seed}


def check_tensors(path: str | os.PathLike[str], checksum: str | None) -> None:
    """Raise `UserError` unless the safetensors file is whole, and the one that `checksum` (SHA-256) was taken of."""
    check_safetensors(path)
    if checksum is not None and sha256(path) != checksum:
        raise UserError(
            f"{path} is damaged (its SHA-256 is not the one in {CONFIG_NAME}): save or copy the adapter again; if you "
            f"changed the file on purpose, remove tensors_sha256 from {CONFIG_NAME}."
        )


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` unless the file's header is valid and its length is the one that the header announces."""
    file = Path(path)
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{file} is cut short ({size} bytes, no complete header): save or copy the adapter again.")
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it has no __iter__
                opened.get_slice(name).get_shape()
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): save or copy the adapter again.") from None


def warn_once(message: str, seen: set[str]) -> None:
    """Warn unless `seen` already holds `message`: one sentence for many layers that share a condition."""
    if message not in seen:
        seen.add(message)
        warnings.warn(message, stacklevel=3)
