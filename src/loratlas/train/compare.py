"""`compare`: several methods on the same work, under rules that let one believe the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loratlas.errors import UserError
from loratlas.train.data import TaskData
from loratlas.train.fit import find_methods, misfits, refuse
from loratlas.train.forgetting import BaseTask
from loratlas.train.jobs import Bench, InProcess, Runner, Source
from loratlas.train.output import prepare_output
from loratlas.train.plan import Plan
from loratlas.train.progress import Progress
from loratlas.train.results import SHIFT, Comparison
from loratlas.train.roles import cast, complete
from loratlas.train.search import GRID, WIDEN, check_grid
from loratlas.train.spec import RunSpec
from loratlas.train.stages import Stages
from loratlas.train.work import Work
from loratlas.train.workers import InProcesses

T = TypeVar("T")


def compare(
    methods: Sequence[str],
    spec: RunSpec,
    work: Work | TaskData,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    grid: Sequence[float] | None = None,
    widen: int = WIDEN,
    search_steps: int | None = None,
    minutes: float | None = None,
    noise_floor: bool | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    baseline: str | None = None,
    base_task: BaseTask | None = None,
    processes: int = 1,
    cluster: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Search each method's learning rate, run every method with every seed, and say what follows.

    Runs with one seed share the order of the data, the start of the head and everything else in `spec`. results.json
    below `spec.output_dir` is rewritten after every run; a run that fails is recorded, and the others go on.

    Args:
        methods: slugs, or several with a plus as "srlora+lora-pro"; see `roles`. The optimizer, objective and
            strategy of `spec` join every one of them.
        spec: template; `output_dir` gets one folder a run, `method`, `seed` and `options` are filled in.
        work: data, loaded, or by name; several processes need the name.
        grid: learning rates to try with each method, on a slice of the training rows and a seed of its own. None takes
            `search.GRID`, or no search if `spec` gives a rate; empty: no search, the rates of the catalogue.
        widen: rates to try beyond the grid with a method, one after the other, while its best is the outermost.
        search_steps: steps of a run of the search; None: those of the final runs.
        minutes: training time of a run, instead of `spec.steps`; a short run of each method turns it into steps.
        noise_floor: run the baseline again under seeds + 1000 (on a CPU the same seed gives the same bits, so that it
            would measure nothing); None does so from two seeds on.
        options: {slug: fields of its configuration}, wherever it takes part, on top of `spec.options`.
        baseline: one of `methods`; None takes lora, then peft-lora, then the first.
        base_task: old work of the base model, measured before and after each run.
        processes: runs that go on at the same time, each in a process of its own.
        cluster: "auto", "local" or the address of a Ray cluster that takes the runs.
        resume: go on in `spec.output_dir`; finished runs are not done again.
        overwrite: replace what is in `spec.output_dir`, once everything else is found to be right.

    Raises:
        UserError: before the first run, with everything that is wrong with any method or setting, or because
            `spec.output_dir` is not empty; after the last one, if none came to an end.
    """
    root, own = Path(spec.output_dir), options or {}
    if not (resume or overwrite):
        prepare_output(root)
    by_name = isinstance(work, Work)
    runs, problems = find_methods(methods, spec, own)
    standard = _tried(problems, lambda: _name(baseline, spec)) if baseline is not None else None
    problems += _wrong_settings(list(runs), seeds, standard, minutes, widen, processes, cluster, by_name)
    rates = _tried(problems, lambda: check_grid(_grid(spec, grid))) or ()
    task = _tried(problems, work.load) if isinstance(work, Work) else work
    if task is not None:
        problems += misfits(runs, task)
        if base_task is not None:
            _tried(problems, partial(base_task.check, task))
    refuse(problems)
    assert task is not None  # else there was a problem

    plan = Plan(
        methods=tuple(runs),
        baseline=standard or next((slug for slug in ("lora", "peft-lora") if slug in runs), next(iter(runs))),
        spec=spec,
        work=work if isinstance(work, Work) else work.description,
        seeds=tuple(seeds),
        grid=rates,
        widen=widen,
        options=own,
        search_steps=search_steps,
        minutes=minutes,
        noise_floor=len(seeds) > 1 if noise_floor is None else noise_floor,
        base_task=base_task,
    )
    if overwrite and not resume:
        prepare_output(root, overwrite=True)
    plan.keep(root, resume=resume)
    progress = progress or Progress()
    progress.described(task.description)
    runner = _runner(work, task, base_task, processes, cluster)
    try:
        return Stages(plan, runs, task, runner, progress, resume=resume).run()
    finally:
        runner.close()


def _runner(
    work: Work | TaskData, task: TaskData, base_task: BaseTask | None, processes: int, cluster: str | None
) -> Runner:
    if isinstance(work, Work) and cluster is not None:
        from loratlas.train.cluster import OnCluster

        return OnCluster(Source(work, base_task), cluster)
    if isinstance(work, Work) and processes > 1:
        return InProcesses(Source(work, base_task), processes)
    return InProcess(Bench(task, base_task))


def _tried(problems: list[str], make: Callable[[], T]) -> T | None:
    try:
        return make()
    except UserError as error:
        problems.append(str(error))
        return None


def _name(method: str, spec: RunSpec) -> str:
    """What `method` is called among the runs."""
    return cast(complete(replace(spec, method=method))).name


def _grid(spec: RunSpec, grid: Sequence[float] | None) -> Sequence[float]:
    if grid is None:
        return GRID if spec.learning_rate is None else ()
    if grid and spec.learning_rate is not None:
        raise UserError("one learning rate for all and a grid to search exclude each other: give one of them.")
    return grid


def _wrong_settings(
    methods: Sequence[str],
    seeds: Sequence[int],
    baseline: str | None,
    minutes: float | None,
    widen: int,
    processes: int,
    cluster: str | None,
    by_name: bool,
) -> list[str]:
    problems = []
    if not seeds:
        problems.append("a comparison needs at least one seed.")
    if len(set(seeds)) < len(seeds) or any(not 0 <= seed < SHIFT for seed in seeds):
        problems.append(
            f"seeds must differ and lie between 0 and {SHIFT - 1}, but they are {', '.join(map(str, seeds))}."
        )
    if baseline is not None and baseline not in methods:
        problems.append(f"the baseline {baseline!r} is not among the compared methods: {', '.join(methods)}.")
    if minutes is not None and minutes <= 0:
        problems.append(f"minutes must be positive, but it is {minutes:g}.")
    if widen < 0:
        problems.append(f"widen must be at least 0, but it is {widen}.")
    if processes < 1:
        problems.append(f"processes must be at least 1, but it is {processes}.")
    if processes > 1 and cluster is not None:
        problems.append("the runs go to local processes or to a cluster: give one of the two.")
    if (processes > 1 or cluster is not None) and not by_name:
        problems.append("other processes load the data themselves: give a loratlas.train.work.Work, not loaded data.")
    return problems
