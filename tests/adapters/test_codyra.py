"""CoDyRA: its thresholds, what happens between tasks, and that a stream forgets less than LoRA trained on and on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, adamw, base_bytes, inputs, train, trainable, view, views

from loratlas import AtlasLoraConfig, CoDyRAConfig, UserError, attach
from loratlas.adapters.codyra import CoDyRA, next_task
from loratlas.adapters.task_stream import Task, learn_tasks
from loratlas.analysis.ranks import rank_history
from loratlas.engine.export import export_lora

Pair = tuple[Tensor, Tensor]


def config(**options: Any) -> CoDyRAConfig:
    defaults = {"r": 4, "max_threshold": 0.1, "threshold_steps": 4, "target_modules": list(TARGETS)}
    return CoDyRAConfig(**{**defaults, **options})


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(Toy(), config(**options))


def ranks(model: nn.Module) -> list[int]:
    return [int(t.gates.count_nonzero()) for t in views(model)]


# --------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("total", [500, 97, 60])
@pytest.mark.parametrize("dense_fraction", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("levels", [3, 20])
def test_the_threshold_rises_as_in_the_official_loop(total: int, dense_fraction: float, levels: int) -> None:
    cfg = config(threshold_steps=levels, dense_fraction=dense_fraction, max_threshold=0.005)
    values, number, threshold = np.linspace(0, 0.005, levels), 0, 0.0
    dense = dense_fraction * total
    interval = int((total - dense) // levels)
    for t in range(total):
        if interval > 0 and t >= dense and t % interval == 0:
            number += 1
            threshold = values[min(number, levels - 1)]
        expected = threshold if t > dense else 0.0
        assert CoDyRA().threshold(cfg, t + 1, total) == pytest.approx(expected), t


def test_short_tasks_reach_the_threshold_as_well() -> None:
    found = [CoDyRA().threshold(config(threshold_steps=50, max_threshold=1.0), step, 12) for step in range(1, 13)]
    assert found[:7] == [0.0] * 7
    assert found == sorted(found)
    assert found[-1] == 1.0


def test_the_schedule_needs_the_number_of_steps() -> None:
    model = adapted()
    with pytest.raises(UserError, match="total_steps=N"):
        attach(model, adamw(model))


# ------------------------------------------------------------------------------------------------------ between tasks


@pytest.mark.parametrize("earlier", ["stack", "merge"])
def test_what_a_task_has_left_stays_and_the_rest_starts_again(earlier: str, tmp_path: Path) -> None:
    model, x = adapted(earlier_tasks=earlier, lora_alpha=8), inputs()
    base, params = base_bytes(model), trainable(model)
    optimizer, kept = adamw(model), [0, 0]
    for number in (1, 2, 3):
        train(model, x + number, 20, optimizer=optimizer)
        y, left = model(x), ranks(model)
        assert list(next_task(model, optimizer).values()) == left
        kept = [before + rank for before, rank in zip(kept, left, strict=True)]
        assert [t.HA.shape[0] for t in views(model)] == [t.HB.shape[1] for t in views(model)] == kept
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
        assert not optimizer.state
        assert ranks(model) == [4, 4]
        assert [int(t.tasks) for t in views(model)] == [number] * 2
    assert all(0 < rank < 12 for rank in kept)
    assert all(now is before for now, before in zip(trainable(model), params, strict=True))
    assert base_bytes(model) == base
    with model.disable_adapter():
        assert torch.equal(model(x), Toy()(x))
    report = export_lora(model, tmp_path / "lora")
    assert report.exact_rank == min(max(kept) + 4, 14)  # three tasks and the four new pairs, whose B is 0
    stock = PeftModel.from_pretrained(Toy(), tmp_path / "lora")
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-5)
    starts = [entry[0] for entry in view(model).rank_log.tolist()]
    assert starts.count(0) == 4
    model.save_pretrained(tmp_path / "own")
    assert [(row["steps"], row["ranks"]) for row in rank_history(tmp_path / "own")] == [([0], [4])] * 2


def test_both_forms_of_earlier_tasks_are_the_same_function() -> None:
    found = {}
    for earlier in ("stack", "merge"):
        torch.manual_seed(1)
        model, x = get_peft_model(Toy(dtype=torch.float64), config(earlier_tasks=earlier)), inputs(dtype=torch.float64)
        for number in (1, 2):
            train(model, x + number, 12)
            next_task(model)
        train(model, x, 12)
        found[earlier] = model(x)
        assert (view(model).folded is None) == (earlier == "stack")
    torch.testing.assert_close(found["merge"], found["stack"], rtol=1e-9, atol=1e-9)


def test_a_long_history_is_packed() -> None:
    model, x = adapted(max_threshold=0.0), inputs()
    for number in range(6):
        train(model, x + number, 3)
        y = model(x)
        next_task(model)
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert [t.HA.shape[0] for t in views(model)] == [12, 14]  # all directions of a layer, not 24


def test_the_next_start_does_not_depend_on_the_process() -> None:
    first, second = adapted(), adapted()
    next_task(first)
    torch.manual_seed(99)
    next_task(second)
    for ours, theirs in zip(trainable(first), trainable(second), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(trainable(first)[0], trainable(adapted())[0])


def test_a_merged_adapter_and_another_method_have_no_next_task() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(UserError, match="is merged: call unmerge_adapter"):
        next_task(model)
    with pytest.raises(UserError, match="no CoDyRA adapter 'default'"):
        next_task(get_peft_model(Toy(), AtlasLoraConfig(target_modules=list(TARGETS))))


@pytest.mark.parametrize("earlier", ["stack", "merge"])
def test_resume_in_the_second_task_is_exact(earlier: str, tmp_path: Path) -> None:
    x, steps = inputs(), 16

    def second_task(stop: int) -> tuple[PeftModel, torch.optim.Optimizer]:
        model = adapted(earlier_tasks=earlier)
        train(model, x + 1, steps)
        next_task(model)
        optimizer = adamw(model)
        train(model, x, stop, total=steps, optimizer=optimizer)
        return model, optimizer

    whole, _ = second_task(steps)
    first, optimizer = second_task(11)
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    optimizer = adamw(second)
    optimizer.load_state_dict(state)
    train(second, x, steps - 11, total=steps, optimizer=optimizer)
    for ours, theirs in zip(views(second), views(whole), strict=True):
        for name in ("A", "B", "gates", "HA", "HB", "tasks", "rank_log"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert any(rank < 4 for rank in ranks(whole))


# ------------------------------------------------------------------------------------------------------------- streams


def regression(model: nn.Module, batch: Pair) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Stream:
    """Two rank-one changes of a linear map; the second is seen in few noisy rows, the first has no input along it."""

    def __init__(self, seed: int) -> None:
        self.seed, generator = seed, torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        q = torch.linalg.qr(draw(16, 16)).Q
        self.weight = draw(16, 16) / 4
        first, second = self.weight + draw(16, 1) @ q[1:2], draw(16, 1) @ q[:1]
        x = draw(64, 15) @ q[1:]
        self.a = (x, x @ first.T)
        x = draw(24, 16)
        self.b = (x, x @ (first + second).T + 0.5 * draw(24, 16))

    def model(self, cfg: AtlasLoraConfig | CoDyRAConfig) -> nn.Module:
        base = nn.Sequential(nn.Linear(16, 16, bias=False))
        base[0].weight.data.copy_(self.weight)
        torch.manual_seed(self.seed)
        return get_peft_model(base, cfg)

    def forgotten(self, max_threshold: float | None, steps: int = 250) -> tuple[float, float]:
        """By how much the error on the first task has grown when the second is learned, and the second's loss.

        None: one LoRA of the same rank, trained on both.
        """
        errors = []

        def after(_: Task) -> None:
            errors.append([float(regression(model, batch).detach()) for batch in (self.a, self.b)])

        tasks = [Task("a", [self.a], steps), Task("b", [self.b], steps)]
        if max_threshold is None:
            model = self.model(AtlasLoraConfig(r=8, target_modules=["0"]))
            for task in tasks:
                optimizer = adamw(model, betas=(0.9, 0.9999))
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
                for _ in range(steps):
                    optimizer.zero_grad()
                    regression(model, task.batches[0]).backward()
                    optimizer.step()
                    scheduler.step()
                after(task)
        else:
            model = self.model(CoDyRAConfig(r=8, max_threshold=max_threshold, target_modules=["0"]))
            learn_tasks(model, tasks, regression, lr=1e-2, after=after)
        (before, _), (now, second) = errors
        return now - before, second


def test_a_stream_forgets_less_than_lora_and_less_the_higher_the_threshold() -> None:
    lora, dense, pruned = (
        torch.tensor([Stream(seed).forgotten(kappa) for seed in (1, 2)]).T for kappa in (None, 0.0, 0.006)
    )
    assert (pruned[0] < 0.5 * lora[0]).all()
    assert pruned[0].mean() < 0.4 * lora[0].mean()
    assert (pruned[0] < dense[0]).all()
    assert (pruned[1] > dense[1]).all()  # what it costs


def test_a_stream_can_be_continued() -> None:
    first, second = Stream(0), Stream(0)
    tasks = [Task("a", [first.a], 20), Task("b", [first.b], 20)]
    cfg = {"r": 4, "target_modules": ["0"]}
    at_once, in_turn = first.model(CoDyRAConfig(**cfg)), second.model(CoDyRAConfig(**cfg))
    seen: list[str] = []
    kept = learn_tasks(at_once, tasks, regression, after=lambda task: seen.append(task.name))
    assert seen == ["a", "b"]
    found = [learn_tasks(in_turn, [task], regression)[0] for task in tasks]
    assert found == kept
    assert torch.equal(at_once(first.a[0]), in_turn(first.a[0]))


def test_streams_that_cannot_work() -> None:
    model, batches = Stream(0).model(CoDyRAConfig(target_modules=["0"])), [Stream(0).a]
    clash = [Task("cats", batches, 1, range(5)), Task("dogs", batches, 1, (7, 4))]
    with pytest.raises(UserError, match="class 4 belongs to task 'cats' and to task 'dogs'"):
        learn_tasks(model, clash, regression)
    with pytest.raises(UserError, match="task 'a' must have at least 1 step"):
        learn_tasks(model, [Task("a", batches, 0)], regression)
    with pytest.raises(UserError, match="task 'a' has no batches left"):
        learn_tasks(model, [Task("a", iter(batches), 2)], regression)
    with pytest.raises(UserError, match="no CoDyRA adapter"):
        learn_tasks(Toy(), [Task("a", batches, 1)], regression)


def test_bad_options() -> None:
    for message, options in {
        "max_threshold must be at least 0": {"max_threshold": -1.0},
        "threshold_steps must be at least 2": {"threshold_steps": 1},
        "dense_fraction must be in": {"dense_fraction": 1.5},
        "earlier_tasks must be 'stack' or 'merge'": {"earlier_tasks": "sum"},
    }.items():
        with pytest.raises(UserError, match=message):
            config(**options)
