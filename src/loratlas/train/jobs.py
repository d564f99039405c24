"""The single runs of a comparison: what each is, how one is done, and how a finished one is recognised."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from transformers.trainer_utils import get_last_checkpoint

from loratlas.errors import UserError
from loratlas.files import write_json, write_text
from loratlas.train.data import TaskData
from loratlas.train.forgetting import BaseTask
from loratlas.train.output import CHECKPOINTS, RESULT, drop_weights
from loratlas.train.progress import Labelled, Progress
from loratlas.train.results import RunResult
from loratlas.train.roles import cast, complete
from loratlas.train.run import run
from loratlas.train.search import hold_out
from loratlas.train.spec import RunSpec
from loratlas.train.work import Work

ERROR = "error.txt"
_TIMED_ROWS = 8  # test rows of a run that is only timed


@dataclass(frozen=True)
class Job:
    """One run. part: "run" and "noise" are measured on the test rows, "search" on held-out rows, "timing" for time."""

    part: str
    label: str
    spec: RunSpec


@dataclass(frozen=True)
class Source:
    """What the runs work on, by name, for other processes."""

    work: Work
    base: BaseTask | None = None


class Bench:
    """What the runs work on, loaded."""

    def __init__(self, task: TaskData, base: BaseTask | None = None) -> None:
        self.task = task
        self.base = base

    @cached_property
    def held_out(self) -> TaskData:
        return hold_out(self.task)

    @cached_property
    def timed(self) -> TaskData:
        return replace(self.task, test=self.task.test.select(range(min(_TIMED_ROWS, len(self.task.test)))))

    def rows_of(self, part: str) -> TaskData:
        return self.held_out if part == "search" else self.timed if part == "timing" else self.task


@lru_cache(maxsize=1)
def opened(source: Source) -> Bench:
    """The bench of `source`, loaded once a process."""
    return Bench(source.work.load(), source.base)


Outcome = tuple[Job, RunResult | str]


class Runner(Protocol):
    """Does jobs and yields each with its result, or with the reason why it has none, in the order in which they end."""

    def run(self, jobs: Iterable[Job], progress: Progress) -> Iterator[Outcome]: ...

    def close(self) -> None: ...


class InProcess:
    """One run after the other, here."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def run(self, jobs: Iterable[Job], progress: Progress) -> Iterator[Outcome]:
        for job in jobs:
            yield job, attempt(job, self._bench, progress.one_run())

    def close(self) -> None:
        pass


def attempt(job: Job, bench: Bench | Source, progress: Progress, *, shared: bool = False) -> RunResult | str:
    """`perform`, but an error becomes the sentence that the comparison records; its traceback goes to error.txt."""
    file = Path(job.spec.output_dir) / ERROR
    try:
        ready = opened(bench) if isinstance(bench, Source) else bench
        result = perform(job, ready, progress, shared=shared)
        file.unlink(missing_ok=True)
        return result
    except UserError as error:
        return str(error)
    except Exception as error:
        write_text(file, traceback.format_exc())
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (see {file})"


def perform(job: Job, bench: Bench, progress: Progress, *, shared: bool = False) -> RunResult:
    """Do `job` from where it stands: finished, begun with checkpoints, or not begun."""
    folder = Path(job.spec.output_dir)
    result = trained(job)
    if result is None:
        told = Labelled(progress, job.label)
        result = run(job.spec, bench.rows_of(job.part), told, resume=_has_checkpoint(folder), shared=shared)
    if job.part in ("search", "timing") and (result.adapter_dir or result.model_dir):
        result.adapter_dir = result.model_dir = ""
        write_json(folder / RESULT, result.to_dict())
        drop_weights(folder)
    if job.part == "run" and bench.base is not None and result.forgetting is None:
        result.forgetting = bench.base.measure(result, bench.task)
        write_json(folder / RESULT, result.to_dict())
    return result


def finished(job: Job, base: BaseTask | None) -> RunResult | None:
    """The result of `job` if nothing of it is left to do."""
    result = trained(job)
    waits = job.part == "run" and base is not None and result is not None and result.forgetting is None
    return None if waits else result


def trained(job: Job) -> RunResult | None:
    """What the run left if it came to an end under this very specification. result.json is written last."""
    spec = job.spec
    try:
        result = RunResult.from_dict(json.loads((Path(spec.output_dir) / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    rate = result.learning_rate if spec.learning_rate is None else spec.learning_rate
    members = cast(complete(spec))
    parts = {part.system.slug: part.values() for part in members.parts}
    asked = (members.name, spec.seed, spec.steps, rate, spec.options, parts)
    done = (result.method, result.seed, result.steps, result.learning_rate, result.options, result.parts)
    return result if asked == done else None


def _has_checkpoint(folder: Path) -> bool:
    checkpoints = folder / CHECKPOINTS
    return checkpoints.is_dir() and get_last_checkpoint(str(checkpoints)) is not None
