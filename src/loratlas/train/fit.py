"""Whether methods, options, task and model go together, found out before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loratlas.errors import UserError
from loratlas.train.data import TaskData
from loratlas.train.methods import build_config
from loratlas.train.models import empty_model
from loratlas.train.roles import Cast, cast, complete
from loratlas.train.setup import adapt
from loratlas.train.spec import RunSpec

Options = dict[str, dict[str, Any]]


def find_methods(methods: Sequence[str], spec: RunSpec, own: Options) -> tuple[dict[str, RunSpec], list[str]]:
    """The runs by name (`Cast.name`), and everything that is wrong with names and options. Needs no model and no data.

    spec: template of the runs, whose options are for every method; own: {slug: options}, wherever it takes part.
    """
    problems = [] if methods else ["name at least one method."]
    runs: dict[str, RunSpec] = {}
    seen: set[str] = set()
    for method in methods:
        try:
            run = complete(replace(spec, method=method))
            run = _with_own(run, own)
            members = cast(run)
        except UserError as error:
            problems.append(str(error))
            continue
        if members.name in runs:
            problems.append(f"{members.name} is named twice.")
        problems += [text for _, text in members.problems()]
        runs[members.name] = run
        seen |= {member.system.slug for member in members.members}
    problems += [
        f"options are given for {slug}: {slug} is not among the methods {', '.join(runs)}."
        for slug in own
        if slug not in seen
    ]
    return runs, problems


def _with_own(spec: RunSpec, own: Options) -> RunSpec:
    """Each member with the options that are for it alone."""
    fields: dict[str, Any] = {
        member.map: {**member.options, **own.get(member.system.slug, {})} for member in cast(spec).members
    }
    return replace(spec, **fields)


def misfits(runs: dict[str, RunSpec], task: TaskData) -> list[str]:
    """What keeps any of `runs` from being built on the model; tried without storage, so it costs next to nothing."""
    problems: list[str] = []
    for name, spec in runs.items():
        members = cast(spec)
        if any(members.problems()):
            continue  # said already
        try:
            model = empty_model(spec.model, task)
        except UserError as error:
            return [str(error)]
        try:
            _build(members, model, task)
        except UserError as error:
            problems.append(f"{name}: {' '.join(str(error).split())}")
        problems += [text for _, text in members.lacking(vars(task))]
    return problems or _idle(runs, task)


def _idle(runs: dict[str, RunSpec], task: TaskData) -> list[str]:
    """What is wrong with sets of rows that none of `runs` asks for; those that do without stand for comparison."""
    able = [each for each in map(cast, runs.values()) if not any(each.problems())]
    said = [[text for _, text in each.idle(vars(task))] for each in able]
    return said[0] if said and all(said) else []


def _build(members: Cast, model: Any, task: TaskData) -> None:
    if members.adapter is not None:
        system, options, _ = members.adapter
        model = adapt(model, build_config(system, task.task, model, options))
    members.check(model)


def refuse(problems: Sequence[str]) -> None:
    """Raise `UserError` with all problems at once, one a line; nothing if there is none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} things are wrong:" + "".join(f"\n- {problem}" for problem in problems))
