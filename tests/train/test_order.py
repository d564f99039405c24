"""Methods whose steps see different rows: a run goes through them in the method's order, and resumes there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from loratlas import DiffoRAConfig
from loratlas.adapters.search_data import SearchSampler
from loratlas.train.batches import text_lengths
from loratlas.train.data import TaskData, load_task
from loratlas.train.progress import Progress
from loratlas.train.run import RunSpec, run
from loratlas.train.stop import Stop, Stopped
from loratlas.train.tables import read_tables

OPTIONS = {"r": 2, "search_steps": 6, "warmup_steps": 2, "search_share": 0.4}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def task(bert: str, tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    rows = [{"text": " ".join([word] * count), "label": word} for word in ("good", "bad") for count in range(1, 21)]
    data = small.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
    return load_task(read_tables(data), bert, name="rows")


def spec(bert: str, out: Path, **settings: Any) -> RunSpec:
    fields = {"steps": 9, "eval_every": 9, "batch_size": 3, "gradient_accumulation": 2, "learning_rate": 1e-2}
    return RunSpec("diffora", bert, str(out), options=OPTIONS, seed=5, **{**fields, **settings})


def test_steps_of_weights_and_logits_see_rows_of_their_own(bert: str, task: TaskData, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def watching(rows: list[dict[str, Any]]) -> Any:
        seen.extend(tuple(row["input_ids"]) for row in rows)
        return task.collator(rows)

    run(spec(bert, tmp_path / "run"), replace(task, collator=watching))
    order = SearchSampler(len(task.train), 6, 9, DiffoRAConfig(**OPTIONS), seed=5)
    assert seen[: len(order)] == [tuple(ids) for ids in task.train[list(order)]["input_ids"]]
    logits = set(seen[12:18] + seen[24:30])  # steps 3 and 5
    weights = set(seen[:12] + seen[18:24] + seen[30:36])
    assert logits.isdisjoint(weights)


@pytest.mark.parametrize("at", [3, 7])
def test_it_goes_on_exactly(bert: str, task: TaskData, tmp_path: Path, at: int) -> None:
    """Stopped in the search, and after it."""
    run(spec(bert, tmp_path / "whole"), task)

    class At(Progress):
        def step(self, step: int, loss: float) -> None:
            stop.requested = stop.requested or step == at

    stop = Stop()
    with pytest.raises(Stopped):
        run(spec(bert, tmp_path / "cut"), task, At(), stop=stop)
    run(spec(bert, tmp_path / "cut"), task, resume=True)
    whole, cut = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_rows_of_a_step_have_like_lengths_where_asked(bert: str, task: TaskData, tmp_path: Path) -> None:
    seen: list[int] = []

    def watching(rows: list[dict[str, Any]]) -> Any:
        seen.extend(len(row["input_ids"]) for row in rows)
        return task.collator(rows)

    run(spec(bert, tmp_path / "run", group_by_length=True), replace(task, collator=watching))
    lengths = text_lengths(task.train)
    order = list(SearchSampler(len(lengths), 6, 9, DiffoRAConfig(**OPTIONS), seed=5, lengths=lengths))
    assert seen[: len(order)] == [lengths[row] for row in order]
