"""A Trainer that times its steps, tells a `Progress`, and stops before a step would ruin the adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from loratlas.engine.parts import Objective
from loratlas.train.atomic import AtomicCheckpoints
from loratlas.train.batches import LengthTrainer
from loratlas.train.complete import checkpoint_name
from loratlas.train.progress import Progress
from loratlas.train.stop import Stop, Stopped

MakeOptimizer = Callable[[nn.Module], Optimizer]


class Diverged(Exception):
    """Loss or gradients of optimizer step `step` are not finite; no parameter has been changed by that step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"the {what} is not finite at step {step}")
        self.step = step
        self.what = what


class Watch(TrainerCallback):
    """Times of the optimizer steps (without evaluations), the last look at the gradients before each, and the wish to
    stop after one."""

    def __init__(self, progress: Progress, metric: str, stop: Stop | None = None) -> None:
        self.progress = progress
        self.metric = metric
        self.stop = stop or Stop()
        self.times: list[float] = []
        self._started = 0.0

    @property
    def step_seconds(self) -> float:
        return median(self.times) if self.times else 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = _now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # under a GradScaler an overflow is normal: the scaler skips that step itself
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not args.fp16 and not math.isfinite(float(torch.nn.utils.get_total_norm(grads))):
            raise Diverged(state.global_step + 1, "gradient")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(_now() - self._started)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.stop.requested

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.requested:
            raise Stopped(state.global_step, Path(args.output_dir) / checkpoint_name(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.progress.step(state.global_step, logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.evaluated(state.global_step, self.metric, kwargs["metrics"][f"eval_{self.metric}"])
        control.should_save |= self.stop.requested  # asked for while it evaluated, which comes before saving


class WatchedTrainer(AtomicCheckpoints, LengthTrainer):
    """transformers' Trainer with a `Watch`; raises `Diverged` where Trainer would step on.

    Args:
        make_optimizer: the optimizer from the model, once that is where it trains; None for Trainer's AdamW.
        objective: the loss of training (`engine.parts.Objective`); evaluations keep the task's own.
    """

    def __init__(
        self,
        watch: Watch,
        make_optimizer: MakeOptimizer | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._make_optimizer, self._objective = make_optimizer, objective
        self.further_columns = objective.own if objective is not None else ()
        self.remove_callback(PrinterCallback)
        # Trainer takes a model's **kwargs for a promise to divide its loss by the items of all accumulated batches;
        # most classifiers break it. Our batches have equal numbers of items, so the mean of their means is right.
        self.model_accepts_loss_kwargs = False
        self.add_callback(watch)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None and self._make_optimizer is not None:
            trained: Any = self.model if model is None else model
            self.optimizer = self._make_optimizer(trained)
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self._objective is None or not model.training:
            own = self._objective.own if self._objective is not None else ()
            inputs = {name: value for name, value in inputs.items() if name not in own}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._objective.at(self.state.global_step, self.state.max_steps)
        loss, outputs = self._objective.forward(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise Diverged(self.state.global_step + 1, "loss")
        return loss


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
