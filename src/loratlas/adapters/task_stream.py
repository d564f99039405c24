"""A stream of tasks in a plain loop, one after another on one backbone, as CoDyRA learns them.

    stream = [Task("birds", bird_batches, 500, labels=range(0, 200)), Task("cars", car_batches, 500, range(200, 396))]
    ranks = learn_tasks(model, stream, after=lambda task: print(task.name, accuracy(model)))

Every task gets a new AdamW with betas (0.9, 0.9999) and no weight decay, and a learning rate that falls by a cosine
from its first step on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from loratlas.adapters.codyra import CoDyRA, next_task
from loratlas.engine.gates import live_ranks
from loratlas.engine.lifecycle import attach
from loratlas.engine.model import atlas_layers
from loratlas.errors import UserError


class Task(NamedTuple):
    """One task of a stream.

    Attributes:
        name: for messages and reports.
        batches: gone through again and again until `steps` are done; a DataLoader, a list, no iterator.
        steps: optimizer steps.
        labels: its classes, by the number or name that the loss sees. Left empty nothing is compared.
    """

    name: str
    batches: Iterable[Any]
    steps: int
    labels: Collection[Hashable] = ()


def learn_tasks(
    model: nn.Module,
    tasks: Sequence[Task],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.9999),
    after: Callable[[Task], None] | None = None,
    adapter_name: str = "default",
) -> list[dict[str, int]]:
    """Learn `tasks` in order. An adapter that has trained before archives that first, so that a stream can go on.

    Args:
        model: a PEFT model with a CoDyRA adapter. All that requires gradients trains.
        loss: (model, batch) -> scalar; None: `model(**batch).loss`.
        lr: rate of every task's first step.
        after: called when a task has been learned, before its pairs are archived.

    Returns:
        For every task {module path: rank that it has left there}.

    Raises:
        UserError: no CoDyRA adapter, a class that belongs to two tasks, a task without batches or steps.
    """
    _check(tasks)
    layers = [(path, found) for path, found in atlas_layers(model, adapter_name) if isinstance(found.method, CoDyRA)]
    views = [layer.view(adapter_name) for _, layer in layers]
    ranks = []
    for task in tasks:
        if not views or int(views[0].step):
            next_task(model, adapter_name=adapter_name)
        _learn(model, task, loss or _own_loss, lr, betas)
        found = live_ranks(views).tolist()
        ranks.append({path: rank for (path, _), rank in zip(layers, found, strict=True)})
        if after is not None:
            after(task)
    return ranks


def _learn(
    model: nn.Module, task: Task, loss: Callable[[nn.Module, Any], Tensor], lr: float, betas: tuple[float, float]
) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda done: 0.5 * (1 + math.cos(math.pi * done / task.steps)))
    lifecycle = attach(model, optimizer, total_steps=task.steps)
    for batch in itertools.islice(_again_and_again(task), task.steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    lifecycle.remove()


def _again_and_again(task: Task) -> Iterator[Any]:
    while True:
        empty = True
        for batch in task.batches:
            empty = False
            yield batch
        if empty:
            raise UserError(f"task {task.name!r} has no batches left: give it a list or a DataLoader, not an iterator.")


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _check(tasks: Sequence[Task]) -> None:
    owner: dict[Hashable, str] = {}
    for task in tasks:
        if task.steps < 1:
            raise UserError(f"task {task.name!r} must have at least 1 step, but it has {task.steps}.")
        clash = next((label for label in task.labels if label in owner), None)
        if clash is not None:
            raise UserError(
                f"class {clash!r} belongs to task {owner[clash]!r} and to task {task.name!r}: give every class of the "
                "stream a label of its own."
            )
        owner.update(dict.fromkeys(task.labels, task.name))
