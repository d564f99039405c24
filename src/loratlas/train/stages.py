"""The stages of a comparison: time, search, run, run the baseline again; and the book that is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratlas.errors import UserError
from loratlas.files import write_json
from loratlas.train.data import TaskData
from loratlas.train.jobs import Job, Runner, finished
from loratlas.train.notes import rules
from loratlas.train.plan import Plan
from loratlas.train.progress import Progress
from loratlas.train.results import SHIFT, Comparison, RunResult
from loratlas.train.roles import cast
from loratlas.train.search import beyond, choose, search_seed
from loratlas.train.spec import RunSpec

RESULTS = "results.json"
_TIMED_STEPS = 20


class Stages:
    """One comparison on its way; results.json is rewritten after every run.

    specs: the runs by name, with their members and options; the stages fill in the rest.
    """

    def __init__(
        self,
        plan: Plan,
        specs: dict[str, RunSpec],
        task: TaskData,
        runner: Runner,
        progress: Progress,
        *,
        resume: bool,
    ) -> None:
        self.plan, self.specs, self.runner, self.progress, self.resume = plan, specs, runner, progress, resume
        self.root = Path(plan.spec.output_dir)
        self.result = Comparison(task.description, task.metric, task.greater_is_better, plan.baseline)
        self.labels = {name: cast(spec).label for name, spec in specs.items()}
        self.steps = dict.fromkeys(specs, plan.spec.steps)
        self._jobs: list[Job] = []
        self._trials: dict[str, list[Job]] = {name: [] for name in specs}
        self._done: dict[str, RunResult] = {}
        self._choices: list[str] = []

    def run(self) -> Comparison:
        """All stages.

        Raises:
            UserError: no run came to an end.
        """
        if self.plan.minutes is not None:
            self._time(self.plan.minutes)
        if self.plan.grid:
            self._search()
        jobs = [self._final(slug, seed) for seed in self.plan.seeds for slug in self.specs]
        if self.plan.noise_floor:
            jobs += [self._again(seed) for seed in self.plan.seeds]
        self._do(jobs)
        if not self.result.runs:
            raise UserError(f"no run came to an end; the first said: {self.result.failures[0]['reason']}")
        self.result.complete = True
        self._write()
        return self.result

    def _time(self, minutes: float) -> None:
        """Each method's number of steps, fixed before its runs so that their schedules fit the time."""
        fields: dict[str, Any] = {"steps": _TIMED_STEPS, "eval_every": _TIMED_STEPS, "save_every": None}
        self._do([self._job("timing", slug, f"timing/{slug}", ", timing", **fields) for slug in self.specs])
        for timed in self.result.timing_runs:
            self.steps[timed.method] = max(1, round(60.0 * minutes * timed.steps / timed.training_seconds))
        timed_methods = {timed.method for timed in self.result.timing_runs}
        self.specs = {slug: spec for slug, spec in self.specs.items() if slug in timed_methods}

    def _search(self) -> None:
        self._do([self._trial(slug, rate) for slug in self.specs for rate in self.plan.grid])
        for _ in range(self.plan.widen):
            further = {slug: beyond(*self._searched(slug)) for slug in self.specs}
            self._do([self._trial(slug, rate) for slug, rate in further.items() if rate is not None])
        for slug in self.specs:
            found = choose(self.labels[slug], *self._searched(slug))
            self.result.rates[slug] = found.rate
            self._choices += [found.note] if found.note else []

    def _trial(self, slug: str, rate: float) -> Job:
        steps = self.plan.search_steps or self.steps[slug]
        fields = {"steps": steps, "eval_every": steps, "learning_rate": rate, "seed": search_seed(self.plan.seeds)}
        trial = self._job("search", slug, f"search/{slug}-lr{rate:g}", f", learning rate {rate:g}", **fields)
        self._trials[slug].append(trial)
        return trial

    def _searched(self, slug: str) -> tuple[list[float], list[RunResult]]:
        """The rates tried with `slug`, and those runs that came to an end."""
        jobs = self._trials[slug]
        done = [self._done[job.spec.output_dir] for job in jobs if job.spec.output_dir in self._done]
        return [job.spec.learning_rate for job in jobs if job.spec.learning_rate is not None], done

    def _final(self, slug: str, seed: int) -> Job:
        folder, label = (slug, "") if len(self.plan.seeds) == 1 else (f"{slug}-seed{seed}", f", seed {seed}")
        return self._job("run", slug, folder, label, **self._final_fields(slug, seed))

    def _again(self, seed: int) -> Job:
        slug, seed = self.plan.baseline, seed + SHIFT
        return self._job("noise", slug, f"noise/{slug}-seed{seed}", f", seed {seed}", **self._final_fields(slug, seed))

    def _final_fields(self, slug: str, seed: int) -> dict[str, Any]:
        rate = self.result.rates.get(slug, self.plan.spec.learning_rate)
        return {"seed": seed, "steps": self.steps[slug], "learning_rate": rate}

    def _job(self, part: str, slug: str, folder: str, label: str, **fields: Any) -> Job:
        spec = replace(self.specs[slug], output_dir=str(self.root / folder), **fields)
        return Job(part, self.labels[slug] + label, spec)

    def _do(self, jobs: Sequence[Job]) -> None:
        """Do what is left of `jobs`."""
        self._jobs += jobs
        left = []
        for job in jobs:
            before = finished(job, self.plan.base_task) if self.resume else None
            if before is None:
                left.append(job)
            else:
                self._done[job.spec.output_dir] = before
        self._write()
        for job, outcome in self.runner.run(left, self.progress):
            if isinstance(outcome, RunResult):
                self._done[job.spec.output_dir] = outcome
            else:
                self.result.failures.append({"run": job.label, "reason": outcome})
            self._write()

    def _write(self) -> None:
        """Bring the book up to date, in the order of the plan whatever the order in which runs end, and write it."""
        result = self.result
        books = {
            "run": result.runs,
            "noise": result.noise_runs,
            "search": result.search_runs,
            "timing": result.timing_runs,
        }
        for part, book in books.items():
            paths = [job.spec.output_dir for job in self._jobs if job.part == part]
            book[:] = [self._done[path] for path in paths if path in self._done]
        result.notes = [*rules(self.plan, self.steps, result), *self._choices, *_mishaps(result)]
        write_json(self.root / RESULTS, result.to_dict())


def _mishaps(result: Comparison) -> list[str]:
    diverged = [run for run in (*result.runs, *result.noise_runs) if run.diverged_at is not None]
    return [
        *(f"{run.label}, seed {run.seed}: diverged at step {run.diverged_at}, value before it." for run in diverged),
        *(f"{failure['run']} failed: {failure['reason']}" for failure in result.failures),
    ]
