"""What a run does between loading the model and training it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import Trainer, TrainingArguments

from loratlas.engine.calibrate import calibrate, needs
from loratlas.train.data import TaskData


def calibrate_for_run(
    model: nn.Module, config: PeftConfig, task: TaskData, arguments: TrainingArguments, steps: int
) -> None:
    """Gather what the start of `config` asks for, on the first `steps` batches that the run will train on.

    The batches, their order, the loss and the mixed precision are those of a Trainer with the same `arguments`, and the
    model is in training mode, as in the methods' own code. Nothing happens for methods that need no statistics. The
    global random state is moved: seed again afterwards.

    Raises:
        UserError: see `engine.calibrate.calibrate`.
    """
    if not needs(config):
        return
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.test,  # never read, but `arguments` plan evaluations
        data_collator=task.collator,
    )
    batches = iter(trainer.get_train_dataloader())

    def step() -> Any:
        inputs = trainer._prepare_inputs(next(batches))
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs)

    was_training = model.training
    model.train()
    try:
        calibrate(model, config, step, steps)
    finally:
        model.train(was_training)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
