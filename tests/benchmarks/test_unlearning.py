"""benchmarks/unlearning.py: its worlds, and that every arm runs and is measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("unlearning")
    for name in {"paired", "unlearning"} - known:
        sys.modules.pop(name, None)


def test_the_groups_share_nobody_and_only_answers_have_labels(script: Any) -> None:
    world = script.World(3)
    names = [name for group in world.groups.values() for name in group]
    assert len(names) == len(set(names)) == script.PEOPLE
    items = world.items("forget", (0, 1))
    assert len(items) == script.FORGOTTEN * len(script.FACTS) * 2
    assert all(sum(label != -100 for label in item["labels"]) == 2 for item in items)


def test_every_arm_runs_and_moves_the_model(script: Any) -> None:
    world = script.World(0)
    model = script.learn(world, ("forget", "retain"), seed=0, steps=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = {}
    for arm in script.ARMS:
        curve = script.unlearn(model, world, arm, script.EVERY, 1e-2, 0)
        assert [m.step for m in curve] == [0, script.EVERY]
        assert curve[0].retain_loss != curve[1].retain_loss
        runs[arm] = [curve]
    assert len(script.ends(runs).rows) == len(script.ARMS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
