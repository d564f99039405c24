"""Which columns of a table are texts, images and labels, and which task they make."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, Image, Value

from loratlas.errors import UserError
from loratlas.train.tasks import METRICS

_LABELS = ("label", "labels", "target", "class", "category", "score", "intent")
# usual pairs of the literature first, then names of single texts
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))
_TEXTS = ("text", "sentence", "content", "review", "document", "question")


@dataclass(frozen=True)
class Columns:
    """The task and the columns that it reads: texts (one, or two for pairs) or image, and the label."""

    task: str
    texts: tuple[str, ...] = ()
    image: str | None = None
    label: str | None = None

    @property
    def used(self) -> list[str]:
        return [column for column in (*self.texts, self.image, self.label) if column is not None]


def find_columns(
    rows: Dataset, name: str, task: str | None, text_columns: list[str] | None, label_column: str | None
) -> Columns:
    """Decide what is not given; see `data.load_task`.

    Raises:
        UserError: a column that is missing, or no way to tell which one is meant (the columns are listed).
    """
    if task is not None and task not in METRICS:
        near = difflib.get_close_matches(task, METRICS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(METRICS)}."
        raise UserError(f"there is no task {task!r}: {hint}")
    for column in [*(text_columns or ()), *([label_column] if label_column else ())]:
        _require(rows, name, column)
    image = next((column for column in rows.column_names if _is_image(rows, column)), None)
    if task is None and image is not None and not text_columns:
        task = "image-classification"
    label = label_column or next((column for column in _LABELS if column in rows.column_names), None)
    if task is None:
        task = _text_task(rows, label)
    if task == "causal-lm":
        return Columns(task, texts=_texts(rows, name, text_columns, None)[:1])
    if label is None:
        there = ", ".join(rows.column_names)
        raise UserError(f"{name} has no label column for {task} (columns: {there}): name it with --label-column.")
    if task == "image-classification":
        if image is None:
            raise UserError(f"{name} has no image column (columns: {', '.join(rows.column_names)}).")
        return Columns(task, image=image, label=label)
    return Columns(task, texts=_texts(rows, name, text_columns, label), label=label)


def _text_task(rows: Dataset, label: str | None) -> str:
    if label is None:
        return "causal-lm"
    feature = rows.features[label]
    floats = isinstance(feature, Value) and feature.dtype.startswith(("float", "double"))
    return "regression" if floats else "text-classification"


def _texts(rows: Dataset, name: str, given: list[str] | None, label: str | None) -> tuple[str, ...]:
    if given:
        if len(given) > 2:
            raise UserError(f"{len(given)} text columns were given; one text or a pair can be read.")
        return tuple(given)
    for pair in _PAIRS:
        if set(pair) <= set(rows.column_names):
            return pair
    for column in _TEXTS:
        if column in rows.column_names:
            return (column,)
    strings = [c for c in rows.column_names if c != label and _is_string(rows, c)]
    if len(strings) != 1:
        there = ", ".join(rows.column_names)
        raise UserError(
            f"{name} leaves open which column holds the text (columns: {there}): name it with --text-column."
        )
    return (strings[0],)


def _is_string(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_image(rows: Dataset, column: str) -> bool:
    """Decoded images, or what a Parquet file without the image feature keeps of them: {"bytes", "path"}."""
    feature = rows.features[column]
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def is_class_label(rows: Dataset, column: str) -> bool:
    return isinstance(rows.features[column], ClassLabel)


def _require(rows: Dataset, name: str, column: str) -> None:
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}.{hint}")
