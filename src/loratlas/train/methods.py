"""A system of the catalogue as a configuration: of PEFT for adapters, of `engine.parts` for what stands beside them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from typing import Any, get_type_hints

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from loratlas.catalog import System, find, load_entry
from loratlas.engine.method import LowRankMethod
from loratlas.errors import UserError
from loratlas.train.models import head_of
from loratlas.train.recipe import PARTS
from loratlas.train.typed import fits, in_words

_TASK_TYPES = {"text-classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
_KINDS = ("adapter", *PARTS)  # what a run can have; other kinds have commands of their own
FALLBACK_LR = 1e-3
_BOOKKEEPING = {"initialized", "requires_package", "tensors_sha256"}  # written into saved adapters, nothing to choose
_PLAIN = (bool, int, float, str, list, dict, type(None))


def trainable(slug: str) -> System:
    """The system `slug`, if a run can train it.

    Raises:
        UserError: unknown (the nearest names are suggested), planned, or not a way to train.
    """
    system = find(slug)
    load_entry(system)
    if system.kind not in _KINDS:
        raise UserError(f"{slug} is of kind {system.kind} and is not trained by itself; see `loratlas methods {slug}`.")
    return system


def build_config(system: System, task: str, model: nn.Module, options: dict[str, Any]) -> PeftConfig:
    """The configuration of the adapter `system` for `model`, of all its linear layers unless `options` say otherwise.

    Raises:
        UserError: an option that the method does not have (the nearest is suggested), or a value out of its range.
    """
    settings = dict(options)
    if task in _TASK_TYPES:
        settings["task_type"] = _TASK_TYPES[task]
    elif task == "image-classification":
        # PEFT has no task type for images, which would leave the head to "all-linear"
        settings.setdefault("modules_to_save", head_of(model))
        settings.setdefault("exclude_modules", head_of(model))
    return configuration(system, settings)


def configuration(system: System, options: dict[str, Any]) -> Any:
    """The configuration of `system` with these options over its own; adapters are of all linear layers.

    Raises:
        UserError: as `build_config`.
    """
    cls, everywhere = load_entry(system), {"target_modules": "all-linear"} if system.kind == "adapter" else {}
    for name in options:
        if name not in _field_names(cls):
            raise UserError(_unknown(system, cls, name))
    try:
        return cls(**{**everywhere, **system.options, **options})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{system.slug}: {error}") from None


def trains_pairs(config: PeftConfig) -> bool:
    """Whether adapters of `config` train low-rank pairs s B A (`LowRankMethod.pair`); of PEFT's own LoRA does."""
    method = getattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)], "method", None)
    if method is None:
        return config.peft_type == PeftType.LORA
    return isinstance(method, LowRankMethod) and type(method).pair is not LowRankMethod.pair


def check_options(system: System, options: dict[str, Any]) -> None:
    """Raise `UserError` for options that the method does not have or whose values are out of range, all at once.

    Needs neither model nor data, so it can run before anything is loaded.
    """
    problems = [text for _, text in option_problems(system, options)]
    if problems:
        raise UserError(" ".join(problems))


def option_problems(system: System, options: dict[str, Any]) -> list[tuple[str, str]]:
    """(option, what is wrong with it) for everything that is wrong; empty if a configuration can be made of them."""
    cls = load_entry(system)
    hints = _hints(cls)
    problems = [(name, _unknown(system, cls, name)) for name in options if name not in _field_names(cls)]
    problems += [
        (name, f"{system.slug}: {name} must be {in_words(hints[name])}, but it is {value!r}.")
        for name, value in options.items()
        if name in hints and not fits(value, hints[name])
    ]
    right = {name: value for name, value in options.items() if name not in dict(problems)}
    # a configuration stops at its first mistake; without that option it shows the next one
    while right:
        try:
            configuration(system, right)
            break
        except UserError as error:
            named = (name for name in right if re.search(rf"\b{name}\b", str(error)))
            name = error.field if error.field in right else next(named, next(iter(right)))
            problems.append((name, str(error)))
            del right[name]
    return problems


def option_fields(system: System) -> list[dataclasses.Field[Any]]:
    """The fields of the configuration that are its user's to set: r, the method's own, those of all."""
    cls = load_entry(system)
    general = {f.name for f in dataclasses.fields(PeftConfig)} | _BOOKKEEPING if system.kind == "adapter" else set()
    fields = [f for f in dataclasses.fields(cls) if f.name not in general]
    own = inspect.get_annotations(cls)
    return sorted(fields, key=lambda f: (f.name != "r", f.name not in own))


def option_values(system: System, config: Any) -> dict[str, Any]:
    """What `config` says, as options that make it again; those that are None by default and still are left out."""
    values = {f.name: getattr(config, f.name) for f in option_fields(system)}
    defaults = {f.name: f.default for f in option_fields(system)}
    plain = {name: _listed(value) for name, value in values.items()}
    return {
        name: value
        for name, value in plain.items()
        if isinstance(value, _PLAIN) and not (value is None and defaults[name] is None)
    }


def default_options(system: System) -> dict[str, Any]:
    """What a run without options uses."""
    return option_values(system, configuration(system, {}))


def _listed(value: Any) -> Any:
    """Sets and tuples as the lists that a file has for them."""
    return sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value


def _field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _unknown(system: System, cls: type, name: str) -> str:
    near = difflib.get_close_matches(name, _field_names(cls), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "its documentation page lists them."
    return f"{system.slug} has no option {name!r}: {hint}"


def _hints(cls: type) -> dict[str, Any]:
    """Types of the fields; none where a library's annotations name what only its type checker sees."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}
