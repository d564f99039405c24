"""Runs that are stopped, find a full disk or another writer, or are resumed as something else."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
from test_checkpoint import Full

from loratlas import UserError, newest_checkpoint
from loratlas.files import DiskFull
from loratlas.lock import locked
from loratlas.train.data import TaskData, load_task
from loratlas.train.progress import Progress
from loratlas.train.run import RunSpec, prepare_output, run
from loratlas.train.stop import Stop, Stopped
from loratlas.train.tables import read_tables


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", small.reviews(120))


@pytest.fixture(scope="module")
def reviews(bert: str, rows: str) -> TaskData:
    return load_task(read_tables(rows), bert, name="reviews")


def spec(bert: str, out: Path, **settings: Any) -> RunSpec:
    defaults: dict[str, Any] = {"steps": 9, "batch_size": 8, "learning_rate": 1e-2, "options": {"r": 2}}
    return RunSpec("srlora", bert, str(out), **{**defaults, **settings})


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class At(Progress):
    """Does something after step `step`, or during the evaluation there."""

    def __init__(self, step: int, act: Any, evaluating: bool = False) -> None:
        self.at, self.act, self.evaluating = step, act, evaluating

    def step(self, step: int, loss: float) -> None:
        if step == self.at and not self.evaluating:
            self.act()

    def evaluated(self, step: int, metric: str, value: float) -> None:
        if step == self.at and self.evaluating:
            self.act()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_signal_leaves_a_checkpoint_that_ends_as_the_whole_run(
    bert: str, reviews: TaskData, tmp_path: Path, number: int, evaluating: bool
) -> None:
    """One that comes when step 3 is over finishes step 4; one while step 4 is evaluated stops there."""
    before = signal.getsignal(number)
    whole = run(spec(bert, tmp_path / "whole", eval_every=4), reviews)
    single = spec(bert, tmp_path / "single", eval_every=4)
    with pytest.raises(Stopped) as stopped, Stop() as stop:
        run(single, reviews, At(4 if evaluating else 3, lambda: os.kill(os.getpid(), number), evaluating), stop=stop)
    assert stopped.value.step == 4
    assert stopped.value.checkpoint == newest_checkpoint(tmp_path / "single" / "checkpoints")
    assert not (tmp_path / "single" / "adapter").exists()
    resumed = run(single, reviews, resume=True)
    assert resumed.history == whole.history
    assert resumed.evals == whole.evals
    assert adapter(tmp_path / "single") == adapter(tmp_path / "whole")
    assert signal.getsignal(number) is before


def test_the_second_signal_leaves_at_once(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as left, Stop() as stop:
        run(spec(bert, tmp_path), reviews, At(4, twice), stop=stop)
    assert not isinstance(left.value, Stopped)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_other_threads_listen_to_nothing() -> None:
    found: list[Any] = []

    def inside() -> None:
        with Stop():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_command_says_how_to_go_on(bert: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    words = ["train", "lora", "--model", bert, "--data", rows, "--steps", "5000", "--eval-every", "5", "--overwrite"]
    words += ["--batch-size", "8", "--out", str(out)]
    main = "from loratlas_command import main; main()"
    with subprocess.Popen([sys.executable, "-c", main, *words], stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        said = ""
        for line in command.stderr:
            said += line
            if "step 5," in line:
                command.send_signal(signal.SIGTERM)
        assert command.wait() == 130, said
    newest = newest_checkpoint(out / "checkpoints")
    assert newest is not None
    kept = [word for word in words if word != "--overwrite"]
    assert said.splitlines()[-2:] == [
        f"stopped after step {newest.name.removeprefix('checkpoint-')}; the checkpoint is in {newest}",
        f"go on with: {shlex.join(['loratlas', *kept, '--resume'])}",
    ]


def test_a_full_disk_ends_the_run_and_not_its_checkpoints(
    bert: str, reviews: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(spec(bert, tmp_path / "whole"), reviews)
    out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Full(after=20))
        with pytest.raises(
            DiskFull, match=r"checkpoint-4 could not be written; checkpoint-2 is complete and untouched"
        ):
            run(spec(bert, out, save_every=2), reviews)
    assert [str(path.relative_to(out)) for path in out.glob("**/*") if path.is_dir()] == [
        "checkpoints",
        "checkpoints/checkpoint-2",
    ]
    resumed = run(spec(bert, out, save_every=3), reviews, resume=True)
    assert resumed.history == whole.history
    assert adapter(out) == adapter(tmp_path / "whole")


def test_a_run_is_resumed_as_itself_only(bert: str, reviews: TaskData, rows: str, tmp_path: Path) -> None:
    begun = spec(bert, tmp_path / "a", save_every=3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
    with pytest.raises(KeyboardInterrupt):
        run(begun, reviews, At(7, lambda: signal.raise_signal(signal.SIGINT)))
    signal.signal(signal.SIGINT, before)
    for changed, said in (
        ({"steps": 12}, "steps was 9 and is 12"),
        ({"method": "lora"}, "method was 'srlora' and is 'lora'"),
        ({"options": {"r": 2, "gamma": 0.25}}, r"options\.gamma was 0\.5 and is 0\.25; resume"),
        ({"options": {"r": 2, "r_target": 9}}, r"options\.r_target was None and is 9"),
        ({"learning_rate": 1e-3, "seed": 1}, r"learning_rate was 0\.01 and is 0\.001, seed was 0 and is 1"),
        ({"eval_every": 3}, "eval_every was 1 and is 3"),
    ):
        with pytest.raises(UserError, match=said):
            run(replace(begun, **changed), reviews, resume=True)
    other = load_task(read_tables(rows, limit=100), bert, name="reviews")
    with pytest.raises(UserError, match=r"data was 'reviews: 108 training .* and is 'reviews: 100 training"):
        run(begun, other, resume=True)
    shuffled = replace(reviews, train=reviews.train.select(range(len(reviews.train) - 1, -1, -1)))
    with pytest.raises(UserError, match=r"data was .* rows \w+' and is .* rows \w+'"):
        run(begun, shuffled, resume=True)
    moved = tmp_path / "moved"
    (tmp_path / "a").rename(moved)
    free = {"output_dir": str(moved), "save_every": None, "options": {"r": 2, "gamma": 0.5}}  # its default, written out
    assert run(replace(begun, **free), reviews, resume=True).final >= 0


def test_two_writers_do_not_share_a_folder(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    out = tmp_path / "run"
    held: list[str] = []

    def intrude() -> None:
        for attempt in (lambda: run(spec(bert, out), reviews), lambda: prepare_output(out, overwrite=True)):
            with pytest.raises(UserError, match=f"run is being written by process {os.getpid()}"):
                attempt()
        held.append("both")

    run(spec(bert, out), reviews, At(3, intrude))
    assert held == ["both"]
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "result.json"]
    with locked(out):
        pass
