"""Phases: which step belongs to which, schedules that start again, optimizers that forget."""

from __future__ import annotations

import pytest
import torch
from toys import adamw, adapted, inputs, train, trainable
from transformers import get_scheduler

from loratlas import UserError
from loratlas.engine.phases import Phases, start_again


def test_steps_have_their_phase() -> None:
    phases = Phases((3, 0, 2))
    assert [phases.at(step) for step in range(1, 8)] == [0, 0, 0, 2, 2, 2, 2]
    assert [step for step in range(1, 8) if phases.begins(step)] == [1, 4]
    assert [phases.start(i) for i in range(3)] == [0, 3, 3]


def test_a_run_is_divided_without_a_rest() -> None:
    assert Phases.split(10, 3).lengths == (3, 3, 4)
    assert Phases.split(10, 4, first=0.4).lengths == (4, 2, 2, 2)
    assert Phases.split(7, 1, first=0.5).lengths == (7,)
    assert Phases.split(2, 4).lengths == (0, 1, 0, 1)


def rates(name: str, warmup: int, total: int, phases: Phases | None, curve: str = "each") -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    if phases is not None:
        phases.pace(scheduler, curve)
        phases.pace(scheduler, curve)  # not bent twice
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_phase_runs_through_the_whole_curve(name: str) -> None:
    found = rates(name, 4, 20, Phases((10, 5, 5)))
    short = {n: rates(name, n // 5, n, None) for n in (5, 10)}
    assert found == pytest.approx(short[10] + short[5] + short[5])


def test_the_curve_ends_with_the_first_phase() -> None:
    assert rates("linear", 0, 8, Phases((4, 2, 2)), "first") == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0, 0, 0])


def test_schedulers_without_a_curve_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match="StepLR cannot be started again at every phase: use a LambdaLR"):
        Phases((4, 4)).pace(torch.optim.lr_scheduler.StepLR(optimizer, 2), "each")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_an_optimizer_that_starts_again_is_a_new_one(kind: type[torch.optim.Optimizer]) -> None:
    """Its steps after that are those of a new optimizer at the same point."""
    models = [adapted("lora"), adapted("lora")]
    old = kind(trainable(models[0]), lr=1e-2)
    train(models[0], inputs(), 4, optimizer=old)
    models[1].load_state_dict(models[0].state_dict())
    start_again(old)
    train(models[0], inputs(), 3, optimizer=old)
    train(models[1], inputs(), 3, optimizer=kind(trainable(models[1]), lr=1e-2))
    for ours, theirs in zip(trainable(models[0]), trainable(models[1]), strict=True):
        assert torch.equal(ours, theirs)


def test_only_what_is_named_starts_again() -> None:
    model = adapted("lora")
    optimizer, params = adamw(model), trainable(model)
    train(model, inputs(), 2, optimizer=optimizer)
    start_again(optimizer, params[:1])
    assert [p in optimizer.state for p in params] == [False, True, True, True]
    with pytest.raises(UserError, match="Adagrad cannot start again"):
        start_again(torch.optim.Adagrad(params))
