"""Whether methods, options, task and model go together, found out before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import get_peft_model

from loratlas.catalog import System
from loratlas.errors import UserError
from loratlas.train.data import TaskData
from loratlas.train.methods import build_config, check_options, trainable
from loratlas.train.models import empty_model
from loratlas.train.run import RunSpec

Options = dict[str, dict[str, Any]]


def find_methods(methods: Sequence[str], spec: RunSpec, own: Options) -> tuple[dict[str, System], list[str]]:
    """The systems by slug, and everything that is wrong with names and options. Needs neither model nor data."""
    problems = [] if methods else ["name at least one method."]
    systems: dict[str, System] = {}
    problems += [f"options are given for {slug}, which is not compared." for slug in own if slug not in methods]
    for slug in dict.fromkeys(methods):
        if methods.count(slug) > 1:
            problems.append(f"{slug} is named twice.")
        try:
            system = trainable(slug)
            check_options(system, {**spec.options, **own.get(slug, {})})
            systems[slug] = system
        except UserError as error:
            problems.append(str(error))
    return systems, problems


def misfits(systems: dict[str, System], spec: RunSpec, own: Options, task: TaskData) -> list[str]:
    """What keeps any of `systems` from being built on the model; tried without storage, so it costs next to nothing."""
    problems = []
    for slug, system in systems.items():
        try:
            model = empty_model(spec.model, task)
        except UserError as error:
            return [str(error)]
        try:
            get_peft_model(model, build_config(system, task.task, model, {**spec.options, **own.get(slug, {})}))
        except ValueError as error:  # PEFT's and ours
            reason = " ".join(str(error).split())
            problems.append(f"{slug}: {reason}")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raise `UserError` with all problems at once, one a line; nothing if there is none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} things are wrong:" + "".join(f"\n- {problem}" for problem in problems))
