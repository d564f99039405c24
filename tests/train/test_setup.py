"""The data pass before training: the very batches of the run, in its report, and only where a start asks for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from loratlas import UserError
from loratlas.train.data import TaskData, load_task
from loratlas.train.run import RunSpec, run
from loratlas.train.tables import read_tables


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def task(bert: str, tmp_path: Path) -> TaskData:
    rows = [{"text": " ".join([word] * count), "label": word} for word in ("good", "bad") for count in range(1, 41)]
    return load_task(read_tables(small.write_jsonl(tmp_path / "rows.jsonl", rows)), bert, name="rows")


def spec(bert: str, out: Path, method: str = "lora-ga", **settings: Any) -> RunSpec:
    defaults: dict[str, Any] = {
        "steps": 4,
        "eval_every": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "options": {"r": 2},
    }
    return RunSpec(method, bert, str(out), **{**defaults, **settings})


def test_it_looks_at_the_batches_that_the_run_trains_on(bert: str, task: TaskData, tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []

    def watching(rows: Any) -> Any:
        batch = task.collator(rows)
        seen.append(batch["attention_mask"].sum(1).tolist())
        return batch

    run(spec(bert, tmp_path / "out", calibrate_steps=3), replace(task, collator=watching))
    again = seen.index(seen[0], 1)
    assert again in (3, 4)  # the loader may look one batch ahead
    assert seen[again : again + 3] == seen[:3]
    assert len({str(batch) for batch in seen[:3]}) == 3


def test_its_time_is_in_the_result_and_its_length_matters(bert: str, task: TaskData, tmp_path: Path) -> None:
    adapters = []
    for steps in (1, 3):
        result = run(spec(bert, tmp_path / str(steps), calibrate_steps=steps), task)
        assert result.setup_seconds > 0
        adapters.append((tmp_path / str(steps) / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]
    with pytest.raises(UserError, match="calibrate_steps must be at least 1"):
        spec(bert, tmp_path, calibrate_steps=0)


def test_short_data_end_the_pass_with_a_warning(bert: str, task: TaskData, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the data ended after \d+ of 500 batches"):
        run(spec(bert, tmp_path, calibrate_steps=500), task)


def test_methods_without_a_need_do_not_pay(
    bert: str, task: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratlas.train.setup as setup

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(setup, "calibrate", refuse)
    run(spec(bert, tmp_path / "lora", "lora"), task)
    with pytest.raises(AssertionError, match="calibrated"):
        run(spec(bert, tmp_path / "lora-ga"), task)
