"""What a run trains and how, and that as arguments of transformers' Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from loratlas.errors import UserError
from loratlas.train.data import TaskData
from loratlas.train.output import CHECKPOINTS


@dataclass
class RunSpec:
    """What to train and how.

    Attributes:
        method: slug of the catalogue, or several as "srlora+lora-pro"; see `roles` for which go together, and which
            train the base model's own weights.
        model: hub id or path of the base model.
        output_dir: directory of this run alone; gets adapter/ or model/, result.json and checkpoints/.
        optimizer, objective, strategy: slugs of the catalogue; None: AdamW, the task's own loss, everything trains.
        learning_rate: None takes the method's from the catalogue.
        options: fields of the method's configuration; the others' have a mapping each.
        eval_every: steps between evaluations on the test rows; None makes five of them.
        warmup: share of the steps in which the learning rate rises.
        group_by_length: texts of like lengths share a batch, see `batches.ByLength`.
        save_every: steps between checkpoints to resume from, None for none.
        calibrate_steps: batches to look at before training, for methods whose start follows the data.
        report_to: integrations of transformers' Trainer that log the run as well, such as "tensorboard".
    """

    method: str
    model: str
    output_dir: str
    optimizer: str | None = None
    objective: str | None = None
    strategy: str | None = None
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
    group_by_length: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    calibrate_steps: int = 8
    report_to: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    objective_options: dict[str, Any] = field(default_factory=dict)
    strategy_options: dict[str, Any] = field(default_factory=dict)

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


def training_arguments(spec: RunSpec, task: TaskData, rate: float, sets: int = 1) -> TrainingArguments:
    """rate: the learning rate, where the catalogue has chosen it. sets: of rows that a training batch carries."""
    return TrainingArguments(
        output_dir=str(Path(spec.output_dir) / CHECKPOINTS),
        max_steps=spec.steps,
        per_device_train_batch_size=sets * spec.batch_size,
        per_device_eval_batch_size=2 * spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=rate,
        lr_scheduler_type=spec.lr_scheduler,
        warmup_steps=int(spec.warmup * spec.steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        bf16=spec.bf16,
        train_sampling_strategy="group_by_length" if spec.group_by_length else "random",
        use_cpu=not torch.accelerator.is_available(),  # bf16 on a processor is refused without it
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
