"""The evaluation of a run, of any model and rows."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from loratlas.train.batches import LengthTrainer
from loratlas.train.data import TaskData
from loratlas.train.random_state import generator_states, set_generator_states

_TIMING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def measured(model: Any, task: TaskData, arguments: TrainingArguments, rows: Dataset) -> dict[str, float]:
    """{"eval_loss", <every metric of the task>} of `model` on encoded `rows`, as a Trainer with `arguments` finds it.

    On all ranks of a distributed run the same. The global random state stays as it is.
    """
    before = generator_states()
    trainer = LengthTrainer(model=model, args=arguments, eval_dataset=rows, **task.for_trainer())
    found = trainer.predict(rows, metric_key_prefix="eval").metrics
    set_generator_states(before)
    return own_metrics(found or {})


def own_metrics(row: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of the Trainer without its times, the metrics under their own names."""
    times = {"epoch", *(f"eval_{name}" for name in _TIMING)}
    left = {name: value for name, value in row.items() if name not in times}
    return {name if name == "eval_loss" else name.removeprefix("eval_"): value for name, value in left.items()}
