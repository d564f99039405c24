"""`run`: one method, one seed, one training with transformers' Trainer."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

from loratlas.analysis.ranks import rank_history
from loratlas.analysis.recomposition import recompositions
from loratlas.engine.lifecycle import LifecycleCallback
from loratlas.errors import UserError
from loratlas.files import recover, whole_directory, write_json, write_text
from loratlas.lock import locked
from loratlas.train.card import model_card
from loratlas.train.complete import newest_checkpoint
from loratlas.train.data import TaskData
from loratlas.train.facts import facts
from loratlas.train.memory import PeakMemory
from loratlas.train.methods import FALLBACK_LR, build_config, option_values, trainable
from loratlas.train.models import load_model
from loratlas.train.progress import Progress
from loratlas.train.recipe_file import write_config
from loratlas.train.reporters import check_reporters
from loratlas.train.results import RunResult
from loratlas.train.same_run import same_run
from loratlas.train.setup import calibrate_for_run
from loratlas.train.stop import Stop
from loratlas.train.watch import Diverged, Watch, WatchedTrainer

RESULT, ADAPTER, CHECKPOINTS = "result.json", "adapter", "checkpoints"
TASK = "task.json"  # beside the adapter: which task it answers, and the names of its classes


@dataclass
class RunSpec:
    """What to train and how.

    Attributes:
        method: slug of the catalogue.
        model: hub id or path of the base model.
        output_dir: directory of this run alone; gets adapter/, result.json and checkpoints/.
        learning_rate: None takes the method's from the catalogue.
        options: fields of the method's configuration.
        eval_every: steps between evaluations on the test rows; None makes five of them.
        warmup: share of the steps in which the learning rate rises.
        save_every: steps between checkpoints to resume from, None for none.
        calibrate_steps: batches to look at before training, for methods whose start follows the data.
        report_to: integrations of transformers' Trainer that log the run as well, such as "tensorboard".
    """

    method: str
    model: str
    output_dir: str
    seed: int = 0
    steps: int = 300
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    lr_scheduler: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    calibrate_steps: int = 8
    report_to: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "calibrate_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, but it is {getattr(self, name)}.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise UserError(f"learning_rate must be positive, but it is {self.learning_rate}.")

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // 5)


def run(
    spec: RunSpec,
    task: TaskData,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    stop: Stop | None = None,
    shared: bool = False,
) -> RunResult:
    """Train, evaluate, save the adapter with a model card, and write result.json.

    Data with names (`TaskData.work`) also get config.yaml, the recipe of the run with every default written out.

    The seed fixes the head's start, the adapter's start, the order of the data and dropout, so runs of several methods
    with one seed differ in nothing but the method. A loss or gradient that is not finite ends the run before its step:
    the adapter of the last good step is evaluated and saved, and `diverged_at` names the step.

    Args:
        resume: continue from the newest complete checkpoint in `spec.output_dir`, as the run that wrote it.
        stop: asks the run to end with a checkpoint after the step in which `requested` becomes true.
        shared: other runs use the machine at the same time; the result says so.

    Raises:
        UserError: an unknown method or option, a model that cannot be loaded, nothing to resume from, settings or data
            other than those of the run to resume, another process in `spec.output_dir`, a full disk.
        Stopped: `stop` was requested; the checkpoint is written.
    """
    first = os.environ.get("RANK", "0") == "0"  # the ranks of a distributed run are one writer
    with locked(spec.output_dir) if first else contextlib.nullcontext():
        checkpoint = _checkpoint(spec) if resume else None
        if first:
            for place in (Path(spec.output_dir), Path(spec.output_dir) / CHECKPOINTS):
                recover(place)
        return _run(spec, task, progress or Progress(), checkpoint, stop, shared)


def _run(
    spec: RunSpec, task: TaskData, progress: Progress, checkpoint: str | None, stop: Stop | None, shared: bool
) -> RunResult:
    system = trainable(spec.method)
    check_reporters(spec.report_to)
    set_seed(spec.seed)
    model = load_model(spec.model, task)
    rate = spec.learning_rate or system.lr or FALLBACK_LR
    config = build_config(system, task.task, model, spec.options)
    options = option_values(system, config)  # before PEFT writes module names into it
    memory, began = PeakMemory(), time.perf_counter()
    calibrate_for_run(model, config, task, _arguments(spec, task, rate), spec.calibrate_steps)
    set_seed(spec.seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # ours are ValueErrors too, and read well as they are
        raise UserError(str(error)) from None
    setup_seconds = time.perf_counter() - began
    watch = Watch(progress, task.metric, stop)
    trainer = WatchedTrainer(
        watch,
        model=adapted,
        args=_arguments(spec, task, rate),
        train_dataset=task.train,
        eval_dataset=task.test,
        data_collator=task.collator,
        processing_class=task.processor,
        compute_metrics=task.measure,
        preprocess_logits_for_metrics=task.preprocess_logits,
        callbacks=[LifecycleCallback()],
    )
    identity = same_run(spec, task, rate, options)
    trainer.checkpoint_extra, trainer.check_extra = identity.settings, identity.check
    known = facts(adapted, spec.steps)
    write_config(spec, task, rate, options)
    progress.prepared(known)
    progress.started(system.name, spec.steps)
    began, diverged = time.perf_counter(), None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Diverged as error:
        diverged = error.step
    seconds = time.perf_counter() - began
    evals = _evaluations(trainer)
    if not evals or evals[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
        evals = _evaluations(trainer)
    _drop_empty(Path(spec.output_dir) / CHECKPOINTS)
    adapter_dir = _save(adapted, task, Path(spec.output_dir) / ADAPTER)
    result = RunResult(
        method=spec.method,
        label=system.name,
        task=task.description,
        model=spec.model,
        seed=spec.seed,
        steps=spec.steps,
        batch_size=spec.batch_size * spec.gradient_accumulation,
        learning_rate=rate,
        options=spec.options,
        metric=task.metric,
        greater_is_better=task.greater_is_better,
        final=evals[-1][task.metric],
        history=[_without(row, "epoch") for row in trainer.state.log_history if "loss" in row],
        evals=evals,
        trainable_parameters=known.trainable_parameters,
        total_parameters=known.total_parameters,
        step_seconds=watch.step_seconds,
        seconds=seconds,
        setup_seconds=setup_seconds,
        peak_memory_bytes=memory.bytes(),
        adapter_dir=str(adapter_dir),
        events=recompositions(adapter_dir),
        ranks=rank_history(adapter_dir),
        diverged_at=diverged,
        adapted_modules=known.modules,
        scaling=known.scaling,
        export_rank=known.export_rank,
        labels=task.labels,
        training_seconds=sum(watch.times),
        shared=shared,
    )
    write_text(adapter_dir / "README.md", model_card(result, system, task))
    write_json(Path(spec.output_dir) / RESULT, result.to_dict())
    progress.finished(result)
    return result


def prepare_output(directory: str | Path, *, overwrite: bool = False) -> Path:
    """Clear the way for a new run or comparison in `directory`; it is made when something is written.

    Raises:
        UserError: there is something in it and `overwrite` is False, or it is a file.
    """
    path = Path(directory)
    if path.is_file():
        raise UserError(f"{path} is a file; give a directory to write into.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"{path} is not empty: choose another --out, or add --overwrite to replace what is there.")
        with locked(path):
            shutil.rmtree(path)
    return path


def _arguments(spec: RunSpec, task: TaskData, rate: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(spec.output_dir) / CHECKPOINTS),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=2 * spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=rate,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=int(spec.warmup * spec.steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        bf16=spec.bf16,
        eval_strategy="steps",
        eval_steps=spec.evaluation_interval,
        save_strategy="no" if spec.save_every is None else "steps",
        save_steps=spec.save_every or spec.steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what `watch` looks for
        report_to=list(spec.report_to) or "none",
        run_name=Path(spec.output_dir).name,
        disable_tqdm=True,
        seed=spec.seed,
        data_seed=spec.seed,
        label_names=["labels"],
        # images are decoded on access from a column that the model does not know
        remove_unused_columns=task.task != "image-classification",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _checkpoint(spec: RunSpec) -> str:
    folder = Path(spec.output_dir) / CHECKPOINTS
    newest = newest_checkpoint(folder) if folder.is_dir() else None
    if newest is None:
        raise UserError(
            f"{folder} holds no checkpoint to resume from; --save-every writes them, and Ctrl-C before it leaves."
        )
    return str(newest)


def _evaluations(trainer: WatchedTrainer) -> list[dict[str, float]]:
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
    rows = [_without(row, *timing) for row in trainer.state.log_history if "eval_loss" in row]
    return [{k if k == "eval_loss" else k.removeprefix("eval_"): v for k, v in row.items()} for row in rows]


def _save(model: PeftModel, task: TaskData, directory: Path) -> Path:
    with whole_directory(directory) as folder:
        model.save_pretrained(str(folder))
        task.processor.save_pretrained(str(folder))
        write_json(folder / TASK, {"task": task.task, "labels": task.labels})
    return directory


def _drop_empty(directory: Path) -> None:
    """Trainer makes its directory even if no checkpoint is asked for."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
