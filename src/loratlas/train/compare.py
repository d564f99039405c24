"""`compare`: several methods on the same work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratlas.catalog import System
from loratlas.errors import UserError
from loratlas.files import write_json
from loratlas.train.data import TaskData
from loratlas.train.methods import check_options, trainable
from loratlas.train.progress import Progress
from loratlas.train.results import Comparison
from loratlas.train.run import RunSpec, run

RESULTS = "results.json"


def compare(
    methods: Sequence[str],
    spec: RunSpec,
    task: TaskData,
    *,
    seeds: Sequence[int] = (0,),
    options: dict[str, dict[str, Any]] | None = None,
    baseline: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every method with every seed and write results.json after each run.

    Runs with one seed share the order of the data, the start of the head, the number of steps and everything else in
    `spec`; a method's own learning rate comes from the catalogue unless `spec` gives one for all.

    Args:
        spec: template; `output_dir` gets one folder a run, `method`, `seed` and `options` are filled in.
        options: {slug: fields of its configuration}, on top of `spec.options`.
        baseline: slug among `methods`; None takes lora, then peft-lora, then the first.

    Raises:
        UserError: before the first run, for anything wrong with any method.
    """
    own = options or {}
    systems = check_methods(methods, spec, own)
    if not seeds:
        raise UserError("a comparison needs at least one seed.")
    if baseline is not None and baseline not in methods:
        raise UserError(f"the baseline {baseline!r} is not among the compared methods: {', '.join(methods)}.")
    chosen = baseline or next((slug for slug in ("lora", "peft-lora") if slug in methods), methods[0])
    result = Comparison(task.description, task.metric, task.greater_is_better, chosen)
    root = Path(spec.output_dir)
    for seed in seeds:
        for slug in systems:
            folder = root / (slug if len(seeds) == 1 else f"{slug}-seed{seed}")
            settings = {**spec.options, **own.get(slug, {})}
            single = replace(spec, method=slug, seed=seed, options=settings, output_dir=os.fspath(folder))
            done = run(single, task, progress)
            result.runs.append(done)
            if done.diverged_at is not None:
                result.notes.append(f"{done.label}, seed {seed}: diverged at step {done.diverged_at}, value before it.")
            write_json(root / RESULTS, result.to_dict())
    result.notes[:0] = _notes(spec, seeds)
    write_json(root / RESULTS, result.to_dict())
    return result


def check_methods(methods: Sequence[str], spec: RunSpec, own: dict[str, dict[str, Any]]) -> dict[str, System]:
    """The systems by slug, or one `UserError` with everything that is wrong with any of them."""
    problems: list[str] = []
    systems: dict[str, System] = {}
    if not methods:
        problems.append("name at least one method.")
    for slug in own:
        if slug not in methods:
            problems.append(f"options are given for {slug}, which is not compared.")
    for slug in methods:
        if slug in systems:
            problems.append(f"{slug} is named twice.")
            continue
        try:
            systems[slug] = trainable(slug)
            check_options(systems[slug], {**spec.options, **own.get(slug, {})})
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(" ".join(problems))
    return systems


def _notes(spec: RunSpec, seeds: Sequence[int]) -> list[str]:
    """What a reader must know before believing the table."""
    count = "One seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    rates = (
        "each method at its catalogued learning rate"
        if spec.learning_rate is None
        else f"all methods at learning rate {spec.learning_rate:g}"
    )
    doubt = " Differences of a few points are within what another seed changes." if len(seeds) == 1 else ""
    return [f"{count}, {spec.steps} steps, {rates}; nothing was tuned on these data.{doubt}"]
