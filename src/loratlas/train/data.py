"""`load_task`: any supported data, ready for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from loratlas.errors import UserError
from loratlas.train import encode
from loratlas.train.columns import Columns, find_columns
from loratlas.train.labels import Labels, encode_labels
from loratlas.train.metrics import MEASURES, Measure
from loratlas.train.tables import Tables
from loratlas.train.tasks import LOWER_IS_BETTER, METRICS

if TYPE_CHECKING:
    from loratlas.train.work import Work


@dataclass
class TaskData:
    """A task as the Trainer takes it.

    Attributes:
        task: one of `tasks.TASKS`.
        train, test: encoded rows.
        collator: joins rows to a batch.
        metric: name of the headline metric.
        labels: names of the classes, None for the other tasks.
        description: one line for people.
        processor: the tokenizer or image processor.
        preprocess_logits: what Trainer keeps of a batch's logits, None for all.
        forget: encoded rows of the forget set, None without one.
        work: the names by which all this can be loaded again; None if it was made in Python.
    """

    task: str
    train: Dataset
    test: Dataset
    collator: Callable[..., Any]
    metric: str
    description: str
    processor: Any
    labels: list[str] | None = None
    preprocess_logits: Callable[..., Any] | None = None
    forget: Dataset | None = None
    work: Work | None = None
    measure: Measure = field(init=False)
    greater_is_better: bool = field(init=False)

    def __post_init__(self) -> None:
        self.measure = MEASURES[self.task]
        self.greater_is_better = self.metric not in LOWER_IS_BETTER

    def for_trainer(self) -> dict[str, Any]:
        """What a Trainer needs to batch and to evaluate."""
        return {
            "data_collator": self.collator,
            "processing_class": self.processor,
            "compute_metrics": self.measure,
            "preprocess_logits_for_metrics": self.preprocess_logits,
        }

    @property
    def num_labels(self) -> int:
        return len(self.labels) if self.labels is not None else 1


def load_task(
    tables: Tables,
    model: str,
    *,
    name: str = "the data",
    task: str | None = None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    metric: str | None = None,
    max_length: int = 128,
    forget: Dataset | None = None,
) -> TaskData:
    """Encode `tables` for `model`.

    Args:
        tables: rows from `tables.read_tables` or `demo.docstrings`.
        model: hub id or path; its tokenizer or image processor is used.
        name: what to call the data in descriptions and errors.
        task: one of `tasks.TASKS`; None reads it off the columns: an image column means image-classification, a label
            column text-classification (regression if it holds floats), neither causal-lm.
        text_columns: one text column, or two for sentence pairs; None finds them by name and type.
        label_column: None finds it by name.
        metric: headline metric, None for the task's usual one.
        max_length: longest text in tokens; length of a block for causal-lm.
        forget: rows that a model shall unlearn, beside those of `tables`; for causal-lm.

    Raises:
        UserError: columns that do not exist or do not fit the task, rows without label, labels in the test rows that
            never occur in training, an unknown task or metric.
    """
    columns = find_columns(tables.train, name, task, text_columns, label_column)
    _same_columns(tables, columns, name)
    headline = _headline(columns.task, metric)
    labels = None
    if columns.task != "causal-lm":
        tables, labels = encode_labels(tables, columns, name)
    if forget is not None:
        _fits_beside(forget, columns)
    encoded = encode.ENCODERS[columns.task](tables, columns, model, max_length)
    blocks = None
    if forget is not None:
        blocks = encode.language_blocks(forget, "forget", columns, encoded["processor"], max_length)
    return TaskData(
        task=columns.task,
        metric=headline,
        description=_describe(name, tables, columns, labels),
        labels=labels.names if labels else None,
        forget=blocks,
        **encoded,
    )


def _same_columns(tables: Tables, columns: Columns, name: str) -> None:
    for column in columns.used:
        if column not in tables.test.column_names:
            there = ", ".join(tables.test.column_names)
            raise UserError(
                f"the test rows of {name} have no column {column!r}, which the training rows have: {there}."
            )


def _fits_beside(forget: Dataset, columns: Columns) -> None:
    if columns.task != "causal-lm":
        raise UserError(f"a forget set is for language models: the task is {columns.task}, so leave --forget out.")
    for column in columns.used:
        if column not in forget.column_names:
            there = ", ".join(forget.column_names)
            raise UserError(f"the forget set has no column {column!r}, which the training rows have: {there}.")


def _headline(task: str, metric: str | None) -> str:
    if metric is not None and metric not in METRICS[task]:
        raise UserError(f"{task} has no metric {metric!r}: choose {', '.join(METRICS[task])}.")
    return metric or METRICS[task][0]


def _describe(name: str, tables: Tables, columns: Columns, labels: Labels | None) -> str:
    kind = f"{len(labels.names)} classes" if labels and labels.names else columns.task
    return f"{name}: {len(tables.train):,} training and {len(tables.test):,} test rows ({tables.split}), {kind}"
