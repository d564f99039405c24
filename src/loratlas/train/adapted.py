"""A saved adapter on its base model, or a whole model and its base, loaded from disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers import AutoConfig

from loratlas.analysis.adapter_folder import PREFIX, AdapterFolder
from loratlas.errors import UserError

# PEFT's task types and the class that transformers has for them
_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_adapted(folder: AdapterFolder, base: str | None = None) -> PeftModel:
    """The adapter in `folder` on its base model, for inference.

    Args:
        base: name or path of the base model; None takes the one in the adapter's config.

    Raises:
        UserError: no base model is known or it cannot be loaded, or the adapter does not fit on it.
    """
    return load_both(folder, base)[0]


def load_both(folder: AdapterFolder, base: str | None = None) -> tuple[PeftModel, list[str]]:
    """As `load_adapted`, and the names of the base model's tensors that its own files do not hold (a new head)."""
    name = base or folder.config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder.directory} does not say its base model: give it with --base.")
    try:
        model, new = _load_base(folder, name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the base model {name!r} could not be loaded ({reason}): give another with --base.") from None
    try:
        return PeftModel.from_pretrained(model, str(folder.directory)), new
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter in {folder.directory} does not fit on {name!r}: {reason}") from None


def load_whole(directory: Path, base: str) -> tuple[Any, Any, list[str]]:
    """The whole model in `directory`, its base model in the same form, and the names of tensors that the base has not.

    Raises:
        UserError: one of them cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(directory)
        cls = getattr(transformers, next(iter(config.architectures or ("AutoModel",))))
        trained = cls.from_pretrained(directory, dtype="auto")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"the model in {directory} could not be loaded: {str(error).strip().splitlines()[0]}") from None
    try:
        return trained, *_with_new(cls, base, copy.deepcopy(config), None, mismatched=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the base model {base!r} could not be loaded ({reason}): give another with --base.") from None


def _load_base(folder: AdapterFolder, name: str) -> tuple[Any, list[str]]:
    config = AutoConfig.from_pretrained(name, revision=folder.config.get("revision"))
    cls = _model_class(folder, config)
    labels = _label_count(folder, cls, config)
    if labels is not None:
        config.num_labels = labels
    # a head for other labels gives way to the saved one
    return _with_new(cls, name, config, folder.config.get("revision"), mismatched=labels is not None)


def _with_new(cls: Any, name: str, config: Any, revision: str | None, *, mismatched: bool) -> tuple[Any, list[str]]:
    """The model, and the names of its tensors that the files do not hold; mismatched: those of other shapes count."""
    model, info = cls.from_pretrained(
        name,
        config=config,
        revision=revision,
        dtype="auto",
        ignore_mismatched_sizes=mismatched,
        output_loading_info=True,
    )
    return model, sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})


def _model_class(folder: AdapterFolder, config: Any) -> Any:
    """The class of transformers that the adapter was trained on."""
    recorded = (folder.config.get("auto_mapping") or {}).get("base_model_class")
    task = folder.config.get("task_type") or ""
    name = recorded or _CLASSES.get(task) or next(iter(config.architectures or ()), None)
    cls = getattr(transformers, name, None) if name else None
    if cls is None:
        raise UserError(
            f"{folder.directory} was trained on a {name or task or 'model class that it does not name'}, which "
            "transformers does not have: load it in Python and call loratlas.engine.export."
        )
    return cls


def _label_count(folder: AdapterFolder, cls: Any, config: Any) -> int | None:
    """Number of labels for which the saved head fits the model; None where no head was saved.

    The config of a pretrained encoder knows nothing of the task's labels, but a saved head has them in its shape. Which
    of its tensors says so depends on the model, so the model is built without storage for each candidate.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(folder.config["peft_type"], "")
    saved = {
        key.removeprefix(PREFIX): tensor.shape
        for key, tensor in folder.tensors.items()
        if not prefix or f".{prefix}" not in key
    }
    candidates = [config.num_labels, *sorted({shape[0] for shape in saved.values() if shape})]
    for count in candidates if saved else ():
        trial = copy.deepcopy(config)
        trial.num_labels = count
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in _from_config(cls, trial).state_dict().items()}
        if all(shapes.get(key) == shape for key, shape in saved.items()):
            return count
    return None


def _from_config(cls: Any, config: Any) -> nn.Module:
    """A model with random weights; the Auto classes and the models themselves spell that differently."""
    return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
