"""A trained adapter or model at work: its answers to single inputs, beside those of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from loratlas.analysis.adapter_folder import AdapterFolder
from loratlas.errors import UserError
from loratlas.train.adapted import load_both, load_whole
from loratlas.train.encode import load_processor
from loratlas.train.output import read_note
from loratlas.train.tasks import TASKS

_TOP = 3


@dataclass(frozen=True)
class Answer:
    """What one model says.

    Attributes:
        label: the likeliest class, None for the other tasks.
        top: up to three likeliest classes with their probabilities, likeliest first.
        value: the number of a regression.
        text: the continuation of a language model.
    """

    label: str | None = None
    top: tuple[tuple[str, float], ...] = ()
    value: float | None = None
    text: str | None = None


class Answerer:
    """A trained adapter or model beside its base model, for inference.

    Args:
        source: an adapter, or the folder of a whole model (`find_whole_model`).
        base: name or path of the base model; None takes the one that the files name.

    Attributes:
        task: one of `tasks.TASKS`.
        new: tensors that the base model's files do not have: its head is random, and it has no answer for this task.

    Raises:
        UserError: see `adapted`; a whole model without a note of its base; no tokenizer or image processor; a task
            without answers.
    """

    def __init__(self, source: AdapterFolder | Path, base: str | None = None, max_new_tokens: int = 40) -> None:
        self.base: Any = None  # of an adapter it is the model with the adapter off
        if isinstance(source, AdapterFolder):
            self.model: Any
            self.model, self.new = load_both(source, base)
            directory, (kind, architecture) = source.directory, _kind(source)
        else:
            self.model, self.base, self.new = load_whole(source, base or _base_of(source))
            directory, kind, architecture = source, "", type(self.model).__name__
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for model in (self.model, self.base):
            if model is not None:
                model.to(device).eval()
        self.max_new_tokens = max_new_tokens
        self.task, labels = _task(directory, kind, architecture, self.model.config)
        self.labels = labels or list(map(str, (self.model.config.id2label or {}).values()))
        cls = AutoImageProcessor if self.task == "image-classification" else AutoTokenizer
        self.processor = _processor(cls, directory, self.model.config._name_or_path)

    def answer(self, item: str) -> tuple[Answer | None, Answer]:
        """(base, trained); the base's is None if its head is new.

        Args:
            item: a text, two texts with a tab between, or the path of an image.

        Raises:
            UserError: a file that is no image.
        """
        inputs = self._encoded(item)
        with torch.inference_mode():
            trained = self._one(self.model, inputs)
            if self.new:
                return None, trained
            if self.base is not None:
                return self._one(self.base, inputs), trained
            with self.model.disable_adapter():
                return self._one(self.model, inputs), trained

    def _encoded(self, item: str) -> Any:
        if self.task == "image-classification":
            inputs = self.processor(_image(item), return_tensors="pt")
        elif self.task == "causal-lm":
            inputs = self.processor(item, return_tensors="pt")
        else:
            inputs = self.processor(*item.split("\t", 1), truncation=True, return_tensors="pt")
        return inputs.to(self.model.device)

    def _one(self, model: Any, inputs: Any) -> Answer:
        if self.task == "causal-lm":
            return Answer(text=self._continued(model, inputs))
        logits = model(**inputs).logits[0].float()
        if self.task == "regression":
            return Answer(value=float(logits[0]))
        return _ranked(logits, self.labels)

    def _continued(self, model: Any, inputs: Any) -> str:
        pad = self.processor.pad_token_id
        tokens = model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.processor.eos_token_id if pad is None else pad,
        )
        return self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _ranked(logits: Tensor, labels: list[str]) -> Answer:
    best = logits.softmax(-1).topk(min(_TOP, len(logits)))
    top = [(labels[index], value) for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    return Answer(label=top[0][0], top=tuple(top))


def _kind(folder: AdapterFolder) -> tuple[str, str]:
    """PEFT's task type and the class of the base model, as far as the adapter's config says."""
    return str(folder.config.get("task_type") or ""), str(
        (folder.config.get("auto_mapping") or {}).get("base_model_class") or ""
    )


def _base_of(directory: Path) -> str:
    base = (read_note(directory) or {}).get("base_model")
    if not base:
        raise UserError(f"{directory} does not say its base model: give it with --base.")
    return str(base)


def _task(directory: Path, kind: str, architecture: str, config: Any) -> tuple[str, list[str] | None]:
    """The task and the names of its classes, from the note that a run leaves, else from the model's class."""
    note = read_note(directory)
    if note is not None:
        return note["task"], note["labels"]
    if kind == "CAUSAL_LM" or architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm", None
    if architecture.endswith("ForImageClassification"):
        return "image-classification", None
    if kind == "SEQ_CLS" or architecture.endswith("ForSequenceClassification"):
        return ("regression" if config.num_labels == 1 else "text-classification"), None
    raise UserError(
        f"{directory} is for {kind or architecture or 'an unknown task'}; answers can be tried for {', '.join(TASKS)}."
    )


def _processor(cls: Any, directory: Path, base: str) -> Any:
    """The one saved with the weights; that of the base model if there is none."""
    try:
        return load_processor(cls, str(directory))
    except UserError:
        return load_processor(cls, base)


def _image(path: str) -> Image.Image:
    try:
        return Image.open(Path(path).expanduser()).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"there is no image {path}.") from None
    except (UnidentifiedImageError, OSError):
        raise UserError(f"{path} cannot be read as an image.") from None
