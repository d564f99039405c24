"""Comparisons: fair, complete after a kill, refused before they start if anything does not fit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from transformers import set_seed

from loratlas import UserError
from loratlas.train import jobs
from loratlas.train.compare import compare
from loratlas.train.data import TaskData
from loratlas.train.models import load_model
from loratlas.train.progress import Progress
from loratlas.train.results import Comparison, RunResult
from loratlas.train.run import RunSpec
from loratlas.train.search import beyond, choose, hold_out
from loratlas.train.work import Work

PLAIN: dict[str, Any] = {"noise_floor": False}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def work(bert: str, tmp_path_factory) -> Work:
    path = small.write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", small.reviews(120))
    return Work(bert, path)


@pytest.fixture(scope="module")
def reviews(work: Work) -> TaskData:
    return work.load()


def spec(bert: str, out: Path, **settings: Any) -> RunSpec:
    defaults: dict[str, Any] = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "options": {"r": 2}}
    return RunSpec("", bert, str(out), **{**defaults, **settings})


def test_every_method_gets_the_same_head_and_data(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    heads = []
    for _ in range(2):
        set_seed(3)
        heads.append(load_model(bert, reviews).classifier.weight)
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=0)
    result = compare(["peft-lora", "lora", "pissa", "srlora", "lora-ga"], spec(bert, tmp_path), reviews, seeds=[0])
    # at the start the adapters change nothing, so the loss of the first step shows head and batch
    starts = [run.history[0]["loss"] for run in result.runs]
    assert starts[1:] == pytest.approx([starts[0]] * 4, rel=1e-6)
    ours, peft = result.runs[1], result.runs[0]
    assert [row["loss"] for row in ours.history] == pytest.approx([row["loss"] for row in peft.history], rel=2e-4)


def test_a_comparison_ranks_and_writes_after_every_run(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    written: list[int] = []

    class Look(Progress):
        def started(self, label: str, steps: int) -> None:
            saved = json.loads((tmp_path / "results.json").read_text())
            assert not saved["complete"]
            written.append(len(saved["runs"]) + len(saved["noise_runs"]))

    result = compare(
        ["srlora", "lora"],
        spec(bert, tmp_path),
        reviews,
        seeds=[0, 1],
        options={"srlora": {"gamma": 1.0}},
        progress=Look(),
    )
    assert written == [0, 1, 2, 3, 4, 5]
    assert (result.baseline, result.complete) == ("lora", True)
    assert [(run.method, run.seed) for run in result.runs] == [("srlora", 0), ("lora", 0), ("srlora", 1), ("lora", 1)]
    assert [(run.method, run.seed) for run in result.noise_runs] == [("lora", 1000), ("lora", 1001)]
    assert [run.options for run in result.runs[:2]] == [{"r": 2, "gamma": 1.0}, {"r": 2}]
    rows = {row["method"]: row for row in result.rows()}
    assert rows["lora"]["values"] == [result.runs[1].final, result.runs[3].final]
    assert rows["lora"]["difference"] is None
    assert rows["srlora"]["difference"]["mean"] == pytest.approx(
        (result.runs[0].final - result.runs[1].final + result.runs[2].final - result.runs[3].final) / 2
    )
    assert rows["lora"]["relative_step_time"] == 1.0
    assert rows["srlora"]["relative_step_time"] > 0
    assert rows["lora"]["trainable_parameters"] == rows["srlora"]["trainable_parameters"]
    assert json.loads((tmp_path / "results.json").read_text()) == result.to_dict()
    assert "2 seeds, 12 steps, all methods at learning rate 0.01" in result.notes[0]


def test_steps_to_the_baseline(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    result = compare(["lora"], spec(bert, tmp_path, steps=4), reviews, seeds=[0])
    run = result.runs[0]
    table = {2: 0.4, 4: 0.8, 6: 0.7}
    run.evals = [{"step": step, "accuracy": value} for step, value in table.items()]
    run.final = 0.7
    assert result.rows()[0]["steps_to_baseline"] == 4
    run.final = 0.9
    assert result.rows()[0]["steps_to_baseline"] is None
    result.greater_is_better = False
    assert result.rows()[0]["steps_to_baseline"] == 2


def test_the_search_sees_training_rows_only_and_its_rates_are_used(
    bert: str, reviews: TaskData, tmp_path: Path
) -> None:
    held = hold_out(reviews)
    assert (len(held.train), len(held.test)) == (97, 11)
    untuned = spec(bert, tmp_path, learning_rate=None)
    rules: dict[str, Any] = {"seeds": [0], "grid": [2e-2, 1e-5], "widen": 0, "search_steps": 30}
    result = compare(["lora", "srlora"], untuned, reviews, **rules)
    assert [(r.method, r.learning_rate, r.steps, r.seed) for r in result.search_runs] == [
        (method, rate, 30, 2000) for method in ("lora", "srlora") for rate in (1e-5, 2e-2)
    ]
    assert all("11 of the training rows, held out" in run.task for run in result.search_runs)
    # 30 steps at 1e-5 change nothing
    assert result.rates == {"lora": 2e-2, "srlora": 2e-2}
    assert [run.learning_rate for run in result.runs] == [2e-2, 2e-2]
    assert not list((tmp_path / "search").rglob("*.safetensors"))
    assert "best learning rate of 1e-05, 0.02 on held-out training rows in 30 steps" in result.notes[0]
    assert "LoRA: its best learning rate, 0.02, is the largest that was tried." in result.notes


def test_the_search_goes_on_while_the_best_is_the_outermost(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    untuned = spec(bert, tmp_path, learning_rate=None)
    rules: dict[str, Any] = {"seeds": [0], "grid": [1e-8, 1e-5, 1e-2], "widen": 2, "search_steps": 30}
    result = compare(["lora"], untuned, reviews, **rules)
    tried = [run.learning_rate for run in result.search_runs]
    # of rates that train nothing none is best: the search can only have gone up
    assert tried[:4] == [1e-8, 1e-5, 1e-2, 10.0]
    assert "(and up to 2 beyond, where the best was the outermost)" in result.notes[0]
    again = compare(["lora"], untuned, reviews, **rules, resume=True)
    assert [run.to_dict() for run in again.search_runs] == [run.to_dict() for run in result.search_runs]
    with pytest.raises(UserError, match="widen must be at least 0, but it is -1"):
        compare(["lora"], spec(bert, tmp_path / "x", learning_rate=None), reviews, widen=-1)


def test_members_that_share_an_adapter_have_searches_of_their_own(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    untuned = spec(bert, tmp_path, learning_rate=None)
    rules: dict[str, Any] = {"seeds": [0], "grid": [1e-5, 2e-2], "widen": 1, "search_steps": 30}
    result = compare(["lora", "lora+lora-plus"], untuned, reviews, **rules)
    for method in ("lora", "lora+lora-plus"):
        tried = [run.learning_rate for run in result.search_runs if run.method == method]
        assert len(set(tried)) == len(tried)
        assert tried[:2] == [1e-5, 2e-2]
        best = max(run.final for run in result.search_runs if run.method == method and run.diverged_at is None)
        mine = [run.learning_rate for run in result.search_runs if run.method == method and run.final == best]
        assert result.rates[method] == min(mine)


def test_the_rate_beyond() -> None:
    assert beyond([2.0, 1.0], [searched(1, 0.1), searched(2, 0.9)]) == 4.0
    assert beyond([1.0, 2.0], [searched(1, 0.9), searched(2, 0.1)]) == 0.5
    assert beyond([1.0, 2.0, 4.0], [searched(1, 0.1), searched(2, 0.9), searched(4, 0.95, diverged=3)]) is None
    assert beyond([1.0, 2.0, 4.0], [searched(1, 0.1), searched(2, 0.9)]) is None  # 4 failed
    assert beyond([1.0, 2.0], [searched(1, 0.9), searched(2, 0.9)]) is None
    assert beyond([1.0], [searched(1, 0.9)]) is None
    assert beyond([1.0, 2.0], []) is None


def searched(rate: float, final: float, diverged: int | None = None, greater: bool = True) -> RunResult:
    return RunResult(
        method="lora",
        label="LoRA",
        task="",
        model="",
        seed=0,
        steps=1,
        batch_size=1,
        learning_rate=rate,
        options={},
        metric="m",
        greater_is_better=greater,
        final=final,
        history=[],
        evals=[],
        trainable_parameters=1,
        total_parameters=1,
        step_seconds=1.0,
        seconds=1.0,
        peak_memory_bytes=None,
        adapter_dir="",
        diverged_at=diverged,
    )


def test_the_choice_of_a_rate() -> None:
    grid = (1.0, 2.0, 3.0)
    assert choose("x", grid, [searched(1, 0.1), searched(2, 0.9), searched(3, 0.9)]).rate == 2.0
    assert choose("x", grid, [searched(2, 0.9), searched(3, 0.95, diverged=4)]).rate == 2.0
    assert choose("x", grid, [searched(1, 0.1, greater=False), searched(2, 0.9, greater=False)]).rate == 1.0
    assert choose("x", grid, [searched(2, 0.9), searched(3, 0.95)]).note is not None
    assert choose("x", grid, [searched(1, 0.5), searched(2, 0.5), searched(3, 0.5)]).note is None
    lost = choose("x", grid, [searched(1, float("nan"))])
    assert lost.rate == 1.0
    assert "no learning rate of the search came to an end" in lost.note


def test_minutes_become_steps_of_each_method(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    result = compare(["lora", "srlora"], spec(bert, tmp_path), reviews, seeds=[0], minutes=0.01)
    for timed, run in zip(result.timing_runs, result.runs, strict=True):
        assert run.steps == round(0.6 * timed.steps / timed.training_seconds)
        assert len(run.history) == run.steps
    assert f"0.01 minutes of training a run (steps: lora {result.runs[0].steps}, srlora" in result.notes[0]


KILLED = """
import os, signal, sys
from loratlas.train.compare import compare
from loratlas.train.progress import Progress
from loratlas.train.run import RunSpec
from loratlas.train.work import Work

class Kill(Progress):
    done = 0
    def finished(self, result):
        self.done += 1
    def step(self, step, loss):
        if self.done == 3 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

model, data, out = sys.argv[1:]
spec = RunSpec("", model, out, steps=12, batch_size=8, options={"r": 2})
compare(["lora", "srlora"], spec, Work(model, data), seeds=[0], noise_floor=True, grid=[1e-3, 1e-2], progress=Kill())
"""


def outcome(result: Comparison) -> Any:
    """All that does not depend on the clock or the place."""
    clock = {"step_seconds", "training_seconds", "setup_seconds", "seconds", "peak_memory_bytes", "relative_step_time"}
    value = result.to_dict()
    for book in ("runs", "noise_runs", "search_runs", "rows"):
        value[book] = [
            {key: item for key, item in run.items() if key not in clock | {"adapter_dir"}} for run in value[book]
        ]
    return value


def test_a_killed_comparison_goes_on_without_doing_anything_twice(bert: str, work: Work, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0], "noise_floor": True, "grid": [1e-3, 1e-2]}
    whole = compare(["lora", "srlora"], spec(bert, tmp_path / "whole", learning_rate=None), work, **settings)
    broken = tmp_path / "broken"
    words = [sys.executable, "-c", KILLED, bert, str(work.data), str(broken)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == -signal.SIGKILL
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in broken.rglob("result.json")}
    assert len(before) == 3
    assert len(json.loads((broken / "results.json").read_text())["search_runs"]) == 3
    resumed = compare(["lora", "srlora"], spec(bert, broken, learning_rate=None), work, **settings, resume=True)
    assert outcome(resumed) == outcome(whole)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def test_resume_refuses_other_settings(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no comparison to go on with"):
        compare(["lora"], spec(bert, tmp_path / "none"), reviews, seeds=[0], resume=True)
    compare(["lora"], spec(bert, tmp_path, steps=2), reviews, seeds=[0])
    with pytest.raises(UserError, match=r"other settings: seeds was \[0\] and is \[0, 1\] now, .*steps was 2"):
        compare(["lora"], spec(bert, tmp_path, steps=3), reviews, seeds=[0, 1], resume=True)


def test_a_failing_run_is_recorded_and_the_others_go_on(
    bert: str, reviews: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jobs.run

    def sometimes(spec: RunSpec, *args: Any, **kwargs: Any) -> RunResult:
        if (spec.method, spec.seed) in broken:
            raise RuntimeError("no\nmemory")
        return real(spec, *args, **kwargs)

    monkeypatch.setattr(jobs, "run", sometimes)
    broken = {("srlora", 1)}
    result = compare(["lora", "srlora"], spec(bert, tmp_path, steps=2), reviews, seeds=[0, 1], **PLAIN)
    assert [(run.method, run.seed) for run in result.runs] == [("lora", 0), ("srlora", 0), ("lora", 1)]
    assert result.failures == [
        {
            "run": "SRLoRA, seed 1",
            "reason": f"RuntimeError: no memory (see {tmp_path / 'srlora-seed1' / 'error.txt'})",
        }
    ]
    assert result.notes[-1].startswith("SRLoRA, seed 1 failed: RuntimeError: no memory")
    assert "Traceback" in (tmp_path / "srlora-seed1" / "error.txt").read_text()
    broken = set()
    again = compare(["lora", "srlora"], spec(bert, tmp_path, steps=2), reviews, seeds=[0, 1], **PLAIN, resume=True)
    assert len(again.runs) == 4
    assert not (tmp_path / "srlora-seed1" / "error.txt").exists()
    broken = {("lora", 0)}
    with pytest.raises(UserError, match="no run came to an end; the first said: RuntimeError: no memory"):
        compare(["lora"], spec(bert, tmp_path / "b"), reviews, seeds=[0])


def test_everything_that_does_not_fit_is_said_at_once(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    base = spec(bert, tmp_path)
    with pytest.raises(UserError) as found:
        compare(
            ["srlroa", "m2mkd", "srlora", "pissa", "lora", "lora"],
            base,
            reviews,
            seeds=[],
            baseline="peft-lora",
            options={
                "srlora": {"gama": 1},
                "pissa": {"target_modules": ["nothing"]},
                "lora": {"target_modules": ["LayerNorm"]},
            },
            grid=[-1.0],
        )
    lines = str(found.value).splitlines()
    assert lines[0] == "9 things are wrong:"
    for words in (
        "there is no method 'srlroa': did you mean",
        "m2mkd is planned",
        "srlora has no option 'gama': did you mean gamma",
        "lora is named twice",
        "the baseline 'peft-lora' is not among",
        "at least one seed",
        "exclude each other",
        "pissa: target_modules (nothing) match no module",
        "is a LayerNorm, which lora cannot adapt",
    ):
        assert sum(words in line for line in lines) == 1, words
    with pytest.raises(UserError, match=r"gamma must be in \[0, 1\]"):
        compare(["srlora"], base, reviews, options={"srlora": {"gamma": 2}})
    with pytest.raises(UserError, match="other processes load the data themselves"):
        compare(["lora"], base, reviews, processes=2)
    assert not any(tmp_path.iterdir())


def test_an_earlier_comparison_is_replaced_only_by_one_that_can_run(
    bert: str, reviews: TaskData, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty: choose another --out"):
        compare(["lora"], spec(bert, tmp_path), reviews, seeds=[0])
    with pytest.raises(UserError, match="m2mkd is planned"):
        compare(["m2mkd"], spec(bert, tmp_path), reviews, seeds=[0], overwrite=True)
    assert (tmp_path / "results.json").read_text() == "{}"
    compare(["lora"], spec(bert, tmp_path, steps=1), reviews, seeds=[0], overwrite=True)
    assert json.loads((tmp_path / "results.json").read_text())["complete"]
