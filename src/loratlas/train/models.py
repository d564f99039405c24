"""The base model of a run."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

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
    options: dict[str, Any] = {}
    if task.task != "causal-lm":
        options = {"num_labels": task.num_labels, "ignore_mismatched_sizes": True}
    if task.labels is not None:
        options["id2label"] = dict(enumerate(task.labels))
        options["label2id"] = {label: number for number, label in enumerate(task.labels)}
    try:
        loaded = getattr(transformers, _CLASSES[task.task]).from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the model {model!r} could not be loaded for {task.task}: {reason}") from None
    if getattr(loaded.config, "pad_token_id", None) is None and hasattr(task.processor, "pad_token_id"):
        loaded.config.pad_token_id = task.processor.pad_token_id  # classifiers find the last token by it
    return loaded


def head_of(model: nn.Module) -> list[str]:
    """Names of the model's top-level head modules: new for each task, they train in full and are saved along."""
    return [name for name in _HEADS if hasattr(model, name)]
