"""The base model of a run."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from loratlas.errors import UserError
from loratlas.train.data import TaskData

_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
_HEADS = ("classifier", "score", "head", "fc")  # what transformers calls the last layer of its classifiers


def load_model(model: str, task: TaskData) -> Any:
    """`model` (hub id or path) with a head for `task`; a new head is drawn from torch's global generator.

    Raises:
        UserError: there is no such model, or its architecture has no form for the task.
    """
    options = _head_options(task)
    if "num_labels" in options:
        options["ignore_mismatched_sizes"] = True
    try:
        loaded = _class(task).from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise _refused(model, task, error) from None
    if getattr(loaded.config, "pad_token_id", None) is None and hasattr(task.processor, "pad_token_id"):
        loaded.config.pad_token_id = task.processor.pad_token_id  # classifiers find the last token by it
    return loaded


def empty_model(model: str, task: TaskData) -> Any:
    """The modules of `load_model` without storage (on the meta device): enough to see what fits on them.

    Raises:
        UserError: as `load_model`.
    """
    try:
        config = AutoConfig.from_pretrained(model, **_head_options(task))
        with torch.device("meta"):
            return _class(task).from_config(config)
    except (OSError, ValueError) as error:
        raise _refused(model, task, error) from None


def _class(task: TaskData) -> Any:
    return getattr(transformers, _CLASSES[task.task])


def _head_options(task: TaskData) -> dict[str, Any]:
    options: dict[str, Any] = {} if task.task == "causal-lm" else {"num_labels": task.num_labels}
    if task.labels is not None:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {label: number for number, label in enumerate(task.labels)}
    return options


def _refused(model: str, task: TaskData, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"the model {model!r} could not be loaded for {task.task}: {reason}")


def head_of(model: nn.Module) -> list[str]:
    """Names of the model's top-level head modules: new for each task, they train in full and are saved along."""
    return [name for name in _HEADS if hasattr(model, name)]
