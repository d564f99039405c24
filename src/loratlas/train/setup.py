"""What a run does between loading the model and training it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments, set_seed

from loratlas.engine.calibrate import calibrate, needs
from loratlas.engine.lifecycle import LifecycleCallback
from loratlas.engine.method import RELATIVE_FISHER
from loratlas.engine.parts import Objective
from loratlas.engine.relative_fisher import relative_fisher
from loratlas.errors import UserError
from loratlas.train.batches import LengthTrainer, text_lengths
from loratlas.train.data import TaskData
from loratlas.train.memory import PeakMemory
from loratlas.train.methods import build_config, option_values
from loratlas.train.models import load_model
from loratlas.train.roles import Cast, Member
from loratlas.train.spec import RunSpec, training_arguments
from loratlas.train.watch import MakeOptimizer


@dataclass
class Ready:
    """A model that can be trained, and what trains it.

    Attributes:
        model: with its adapter; without one all its own parameters train.
        options: of each member with every default written out, by the name of their mapping in a recipe.
        make_optimizer: called when the model is where it trains; None for the Trainer's AdamW.
        objective: see `engine.parts.Objective`; None for the task's own loss.
        beside: name of the set of rows that batches carry beside the training rows, None for none.
        strategy: the strategy's callback.
        memory: counts since the model is loaded.
        seconds: what making it took, without loading.
    """

    model: Any
    options: dict[str, dict[str, Any]]
    make_optimizer: MakeOptimizer | None
    objective: Objective | None
    beside: str | None
    strategy: Any
    memory: PeakMemory
    seconds: float

    @property
    def callbacks(self) -> list[TrainerCallback]:
        return [LifecycleCallback(), *([self.strategy] if self.strategy else [])]

    def forecast(self, total_steps: int) -> list[str]:
        """What the strategy says before training."""
        return self.strategy.forecast(self.model, total_steps) if hasattr(self.strategy, "forecast") else []

    def remarks(self) -> list[str]:
        """What the strategy says after training."""
        return self.strategy.remarks() if hasattr(self.strategy, "remarks") else []

    def save_result(self, directory: str) -> None:
        """Write what the strategy leaves beside the weights."""
        if hasattr(self.strategy, "save_result"):
            self.strategy.save_result(self.model, directory)


def ready(spec: RunSpec, cast: Cast, task: TaskData, rate: float) -> Ready:
    """Load the model of `spec`, adapt it if the cast has an adapter, and make the parts.

    Raises:
        UserError: a model that cannot be loaded, or a member that does not fit it.
    """
    set_seed(spec.seed)
    model = load_model(spec.model, task)
    memory, began = PeakMemory(), time.perf_counter()
    model, options = _adapted(model, spec, cast, task, rate)
    cast.check(model)
    for part in cast.parts:
        options[part.map] = part.values()
    optimizer = cast.optimizer and partial(cast.optimizer.part().build, lr=rate, weight_decay=spec.weight_decay)
    objective = cast.objective and _objective(cast.objective, model, task)
    beside = cast.objective and next(iter(cast.objective.part().sets), None)
    strategy = cast.strategy and cast.strategy.part().build()
    return Ready(model, options, optimizer, objective, beside, strategy, memory, time.perf_counter() - began)


def _objective(member: Member, model: Any, task: TaskData) -> Objective:
    objective: Objective = member.part().build(model)
    carried = (*member.part().sets, *task.train.column_names)
    missing = [key for key in objective.own if key not in carried]
    if missing:
        raise UserError(
            f"{member.system.slug} needs {', '.join(missing)} beside the texts of each row, which runs do not read: "
            "train it in your own loop or Trainer, as its page shows."
        )
    return objective


def _adapted(model: Any, spec: RunSpec, cast: Cast, task: TaskData, rate: float) -> tuple[Any, dict[str, Any]]:
    if cast.adapter is None:
        return model, {}
    config = build_config(cast.adapter.system, task.task, model, cast.adapter.options)
    options = option_values(cast.adapter.system, config)  # before PEFT writes module names into it
    calibrate_for_run(model, config, task, training_arguments(spec, task, rate), spec.calibrate_steps)
    set_seed(spec.seed)
    return adapt(model, config), {cast.adapter.map: options}


def adapt(model: nn.Module, config: PeftConfig) -> PeftModel:
    """`get_peft_model`; what does not fit is a `UserError`."""
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # ours are ValueErrors too, and read well as they are
        raise UserError(str(error)) from None


def own_order(model: Any, rows: Dataset, arguments: TrainingArguments) -> Sampler[int] | None:
    """The order in which the adapter's method wants the training rows, see `Method.order`; None: the usual one."""
    method = getattr(model.base_model, "method", None) if isinstance(model, PeftModel) else None
    if method is None or not method.overrides("order"):
        return None
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    lengths = text_lengths(rows) if arguments.train_sampling_strategy == "group_by_length" else None
    return method.order(model.active_peft_config, len(rows), per_step, arguments.max_steps, arguments.seed, lengths)


def calibrate_for_run(
    model: nn.Module, config: PeftConfig, task: TaskData, arguments: TrainingArguments, steps: int
) -> None:
    """Gather what the start of `config` asks for, on the first `steps` batches that the run will train on.

    The batches, their order, the loss and the mixed precision are those of a Trainer with the same `arguments`, and the
    model is in training mode, as in the methods' own code. The loss is the task's own, whatever the objective. Methods
    that compare two sets look at as many batches of the forget set as well, and nothing happens for those that need no
    statistics. The global random state is moved: seed again afterwards.

    Raises:
        UserError: see `engine.calibrate.calibrate` and `engine.relative_fisher.relative_fisher`.
    """
    if not needs(config):
        return
    trainer = _looking(model, task, arguments, task.train)
    batches = iter(trainer.get_train_dataloader())

    def loss(model: nn.Module, batch: Any) -> Any:
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, inputs)

    was_training = model.training
    model.train()
    try:
        if RELATIVE_FISHER in needs(config):
            forget = _looking(model, task, arguments, task.forget).get_train_dataloader()
            relative_fisher(model, config, forget, batches, steps=steps, loss=loss)
        else:
            calibrate(model, config, lambda: loss(model, next(batches)), steps)
    finally:
        model.train(was_training)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _looking(model: nn.Module, task: TaskData, arguments: TrainingArguments, rows: Any) -> LengthTrainer:
    """A Trainer whose batches of `rows` are looked at."""
    return LengthTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=task.test,  # never read, but `arguments` plan evaluations
        data_collator=task.collator,
    )
