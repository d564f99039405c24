"""A method of the catalogue as a PEFT configuration for a task."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from peft import PeftConfig
from torch import nn

from loratlas.catalog import System, find, load_entry
from loratlas.errors import UserError
from loratlas.train.models import head_of

_TASK_TYPES = {"text-classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
_KINDS = ("adapter",)  # what a run can train so far; other kinds join with their own recipes
FALLBACK_LR = 1e-3


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
    """The configuration of `system` for `model`; unless `options` say otherwise it adapts all linear layers.

    Raises:
        UserError: an option that the method does not have (the nearest is suggested), or a value out of its range.
    """
    settings: dict[str, Any] = {"target_modules": "all-linear", **system.options, **options}
    if task in _TASK_TYPES:
        settings["task_type"] = _TASK_TYPES[task]
    elif task == "image-classification":
        # PEFT has no task type for images, which would leave the head to "all-linear"
        settings.setdefault("modules_to_save", head_of(model))
        settings.setdefault("exclude_modules", head_of(model))
    return _make(system, settings)


def check_options(system: System, options: dict[str, Any]) -> None:
    """Raise `UserError` for an option that the method does not have or whose value is out of range.

    Needs neither model nor data, so it can run before anything is loaded.
    """
    _make(system, {"target_modules": "all-linear", **system.options, **options})


def _make(system: System, settings: dict[str, Any]) -> PeftConfig:
    cls = load_entry(system)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "its documentation page lists them."
            raise UserError(f"{system.slug} has no option {name!r}: {hint}")
    try:
        return cls(**settings)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{system.slug}: {error}") from None
