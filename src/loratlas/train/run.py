"""`run`: one method, one seed, one training with transformers' Trainer."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from loratlas.analysis.adapter_folder import read_adapter
from loratlas.analysis.ranks import rank_history
from loratlas.analysis.recomposition import fresh_rates, recomposition_states, recompositions
from loratlas.files import recover, write_json, write_text
from loratlas.lock import locked
from loratlas.train.batches import usual_order
from loratlas.train.beside import InTurn, joined
from loratlas.train.card import model_card
from loratlas.train.data import TaskData
from loratlas.train.facts import facts, used_parameters
from loratlas.train.measure import measured, own_metrics
from loratlas.train.output import (
    CHECKPOINTS,
    RESULT,
    checkpoint_of,
    drop_empty_checkpoints,
    prepare_output,
    save_weights,
)
from loratlas.train.progress import Progress
from loratlas.train.recipe_check import raise_any
from loratlas.train.recipe_file import write_config
from loratlas.train.reporters import check_reporters
from loratlas.train.results import RunResult
from loratlas.train.roles import cast, complete
from loratlas.train.same_run import same_run
from loratlas.train.setup import own_order, ready
from loratlas.train.spec import RunSpec, training_arguments
from loratlas.train.stop import Stop
from loratlas.train.watch import Diverged, Watch, WatchedTrainer

__all__ = ["RunSpec", "prepare_output", "run"]


def run(
    spec: RunSpec,
    task: TaskData,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    stop: Stop | None = None,
    shared: bool = False,
) -> RunResult:
    """Train, evaluate, save the adapter (or the whole model) with a model card, and write result.json.

    Data with names (`TaskData.work`) also get config.yaml, the recipe of the run with every default written out.

    The seed fixes the head's start, the adapter's start, the order of the data and dropout, so runs of several methods
    with one seed differ in nothing but the method. A loss or gradient that is not finite ends the run before its step:
    the state after the last good step is evaluated and saved, and `diverged_at` names the step.

    Args:
        resume: continue from the newest complete checkpoint in `spec.output_dir`, as the run that wrote it.
        stop: asks the run to end with a checkpoint after the step in which `requested` becomes true.
        shared: other runs use the machine at the same time; the result says so.

    Raises:
        UserError: an unknown method or option, a model that cannot be loaded, nothing to resume from, settings or data
            other than those of the run to resume, another process in `spec.output_dir`, a full disk.
        Stopped: `stop` was requested; the checkpoint is written.
    """
    spec = complete(spec)
    first = os.environ.get("RANK", "0") == "0"  # the ranks of a distributed run are one writer
    with locked(spec.output_dir) if first else contextlib.nullcontext():
        checkpoint = checkpoint_of(spec.output_dir) if resume else None
        if first:
            for place in (Path(spec.output_dir), Path(spec.output_dir) / CHECKPOINTS):
                recover(place)
        return _run(spec, task, progress or Progress(), checkpoint, stop, shared)


def _run(
    spec: RunSpec, task: TaskData, progress: Progress, checkpoint: str | None, stop: Stop | None, shared: bool
) -> RunResult:
    members = cast(spec)
    raise_any([text for _, text in members.problems()] or [text for _, text in members.lacking(vars(task))])
    check_reporters(spec.report_to)
    rate = spec.learning_rate or members.rate
    made = ready(spec, members, task, rate)
    arguments = training_arguments(spec, task, rate)
    rows, order = task.train, own_order(made.model, task.train, arguments)
    if made.beside is not None:
        assert task.forget is not None  # members.lacking has seen to that
        rows = joined(task.train, task.forget, made.beside)
        order = InTurn(order or usual_order(task.train, arguments), len(task.train), len(task.forget), spec.seed)
    forget = _Forget(made.model, task, arguments)
    watch = Watch(progress, task.metric, stop)
    trainer = WatchedTrainer(
        watch,
        made.make_optimizer,
        made.objective,
        model=made.model,
        args=training_arguments(spec, task, rate, sets=2) if made.beside else arguments,
        train_dataset=rows,
        eval_dataset=task.test,
        callbacks=made.callbacks,
        **task.for_trainer(),
    )
    trainer.order = order
    identity = same_run(spec, task, rate, made.options)
    trainer.checkpoint_extra, trainer.check_extra = identity.settings, identity.check
    known = facts(made.model, spec.steps, made.forecast(spec.steps))
    write_config(spec, task, rate, made.options)
    progress.prepared(known)
    progress.started(members.label, spec.steps)
    began, diverged = time.perf_counter(), None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        diverged = error.step
    seconds = time.perf_counter() - began
    evals = _evaluated(trainer)
    drop_empty_checkpoints(spec.output_dir)
    weights = save_weights(made.model, task, spec.output_dir, spec.model)
    if diverged is None:
        made.save_result(spec.output_dir)
    result = RunResult(
        method=members.name,
        label=members.label,
        task=task.description,
        model=spec.model,
        seed=spec.seed,
        steps=spec.steps,
        batch_size=spec.batch_size * spec.gradient_accumulation,
        learning_rate=rate,
        options=spec.options,
        parts={part.system.slug: made.options[part.map] for part in members.parts},
        metric=task.metric,
        greater_is_better=task.greater_is_better,
        final=evals[-1][task.metric],
        history=[_without(row, "epoch") for row in trainer.state.log_history if "loss" in row],
        evals=evals,
        trainable_parameters=known.trainable_parameters,
        total_parameters=known.total_parameters,
        step_seconds=watch.step_seconds,
        seconds=seconds,
        setup_seconds=made.seconds,
        peak_memory_bytes=made.memory.bytes(),
        adapter_dir=str(weights) if members.adapter else "",
        model_dir="" if members.adapter else str(weights),
        **(_moves(weights, adam=members.optimizer is None) if members.adapter else {}),
        diverged_at=diverged,
        remarks=made.remarks(),
        adapted_modules=known.modules,
        scaling=known.scaling,
        export_rank=known.export_rank,
        labels=task.labels,
        training_seconds=sum(watch.times),
        shared=shared,
        forget=forget.result(),
        used_parameters=used_parameters(made.model, known.trainable_parameters),
    )
    write_text(weights / "README.md", model_card(result, members, task))
    write_json(Path(spec.output_dir) / RESULT, result.to_dict())
    progress.finished(result)
    return result


class _Forget:
    """The loss on the forget set, now and when `result` is called."""

    def __init__(self, model: Any, task: TaskData, arguments: TrainingArguments) -> None:
        self._model, self._task, self._arguments = model, task, arguments
        self._before = self._loss()

    def _loss(self) -> float | None:
        if self._task.forget is None:
            return None
        return measured(self._model, self._task, self._arguments, self._task.forget)["eval_loss"]

    def result(self) -> dict[str, Any] | None:
        """See `RunResult.forget`."""
        if self._task.forget is None:
            return None
        return {"rows": len(self._task.forget), "before": self._before, "after": self._loss()}


def _moves(weights: Path, *, adam: bool) -> dict[str, Any]:
    """What the adapter's own logs say of its training; `fresh` speaks of Adam, which trains where nothing is named."""
    folder = read_adapter(weights)
    return {
        "events": recompositions(folder),
        "recomposition": recomposition_states(folder),
        "fresh": fresh_rates(folder) if adam else [],
        "ranks": rank_history(folder),
    }


def _evaluated(trainer: WatchedTrainer) -> list[dict[str, float]]:
    """All evaluations; one more is made if the last step had none."""
    evals = _evaluations(trainer)
    if not evals or evals[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        evals = _evaluations(trainer)
    return evals


def _evaluations(trainer: WatchedTrainer) -> list[dict[str, float]]:
    return [own_metrics(row) for row in trainer.state.log_history if "eval_loss" in row]


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
