"""Runs in other processes: the same results, and the death of one costs its run alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import small

from loratlas.train.compare import compare
from loratlas.train.jobs import Job, Source
from loratlas.train.progress import Progress
from loratlas.train.results import RunResult
from loratlas.train.run import RunSpec
from loratlas.train.work import Work
from loratlas.train.workers import InProcesses


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    root = tmp_path_factory.mktemp("work")
    return Work(small.bert(root / "bert"), small.write_jsonl(root / "reviews.jsonl", small.reviews(120)))


def spec(work: Work, out: Path, **settings: Any) -> RunSpec:
    fields = {"steps": 8, "batch_size": 8, "learning_rate": 1e-2, "options": {"r": 2}, **settings}
    return RunSpec(fields.pop("method", ""), work.base, str(out), **fields)


class Lines(Progress):
    """Collects what every run says, under its label."""

    def __init__(self, said: dict[str, list[Any]] | None = None) -> None:
        self.said = {} if said is None else said
        self.mine: list[Any] = []

    def one_run(self) -> Progress:
        return Lines(self.said)

    def started(self, label: str, steps: int) -> None:
        self.mine = self.said.setdefault(label, [steps])

    def step(self, step: int, loss: float) -> None:
        self.mine.append(step)

    def evaluated(self, step: int, metric: str, value: float) -> None:
        self.mine.append(metric)

    def finished(self, result: RunResult) -> None:
        self.mine.append(result.seed)


def test_processes_give_what_one_gives(work: Work, tmp_path: Path) -> None:
    lines = Lines()
    settings: dict[str, Any] = {"seeds": [0, 1], "noise_floor": False}
    alone = compare(["lora", "srlora"], spec(work, tmp_path / "a", eval_every=8), work, **settings)
    many = compare(
        ["lora", "srlora"], spec(work, tmp_path / "b", eval_every=8), work, **settings, processes=2, progress=lines
    )
    assert [(run.method, run.seed) for run in many.runs] == [(run.method, run.seed) for run in alone.runs]
    assert [run.history for run in many.runs] == [run.history for run in alone.runs]
    assert lines.said == {
        f"{label}, seed {seed}": [8, *range(1, 9), "accuracy", seed] for label in ("LoRA", "SRLoRA") for seed in (0, 1)
    }
    assert [row["relative_step_time"] for row in many.rows()] == [None, None]
    assert "Runs shared the machine" in " ".join(many.notes)
    assert alone.rows()[0]["relative_step_time"] == 1.0
    assert not multiprocessing.active_children()


def test_a_process_that_dies_fails_its_run_and_is_replaced(work: Work, tmp_path: Path) -> None:
    class Murder(Progress):
        def step(self, step: int, loss: float) -> None:
            if step == 3 and not (tmp_path / "b").exists():
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    runner = InProcesses(Source(work), 1)
    jobs = [Job("run", name, spec(work, tmp_path / name, method="lora")) for name in "ab"]
    try:
        (first, reason), (second, result) = runner.run(jobs, Murder())
    finally:
        runner.close()
    assert (first.label, second.label) == ("a", "b")
    assert reason == "its process was ended by SIGKILL: perhaps memory ran out; try fewer processes."
    assert isinstance(result, RunResult)
    assert len(result.history) == 8
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_all_processes(work: Work, tmp_path: Path) -> None:
    class Interrupt(Progress):
        def step(self, step: int, loss: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(["lora"], spec(work, tmp_path), work, seeds=[0, 1], processes=2, progress=Interrupt())
    assert not multiprocessing.active_children()


def test_a_local_ray_cluster_gives_the_same(work: Work, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install loratlas[cluster]")
    lines = Lines()
    alone = compare(["lora", "srlora"], spec(work, tmp_path / "a", eval_every=8), work, seeds=[0])
    spread = compare(
        ["lora", "srlora"], spec(work, tmp_path / "b", eval_every=8), work, seeds=[0], cluster="local", progress=lines
    )
    assert not spread.failures
    assert [run.history for run in spread.runs] == [run.history for run in alone.runs]
    assert lines.said == {label: [8, "accuracy", 0] for label in ("LoRA", "SRLoRA")}
    assert all(run.shared for run in spread.runs)
