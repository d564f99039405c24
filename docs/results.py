"""benchmarks/results as Markdown: what was measured, how, and where."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from curves import svg
from markdown_table import table

from loratlas.train.wording import headings, noise_line, ranked, row_cells, verdict_line

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def results(name: str) -> str:
    """The tables of a benchmark, or a line that says how to make them."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return f"Not measured yet: run `python benchmarks/{name}.py`."
    found = json.loads(file.read_text(encoding="utf-8"))
    if "tasks" in found:
        return glue(found)
    if "arms" in found:
        return study(found)
    return pretraining(found) if name == "pretraining" else measured(found)


def measured(found: dict[str, Any]) -> str:
    """How and where a benchmark was run, its bars and its other tables."""
    machine, settings = found["machine"], found["settings"]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    about = (
        f"`{found['command']}`, {found['date']}, {settings['rounds']} rounds, {settings['threads']} thread(s) of "
        f"{machine['cores']} cores ({machine['cpu']}), load {machine['load_average']:.1f}; {versions}."
    )
    tables = [f"**{each['title']}**\n\n{table(each['head'], each['rows'])}" for each in found["tables"]]
    return "\n\n".join([about, *tables])


def glue(found: dict[str, Any]) -> str:
    """A leaderboard a task, the verdict under it."""
    parts = []
    for name, task in found["tasks"].items():
        rows = [tuple(row_cells(task, row)) for row in ranked(task)]
        words = [*task["notes"][:1], verdict_line(task), noise_line(task)]
        parts += [f"**{name}**: {task['task']}. `{task['command']}`", table(tuple(headings(task)), rows)]
        parts += [" ".join(filter(None, words))]
        parts += [f"Failed: {failure['run']} ({failure['reason']})" for failure in task["failures"]]
    return "\n\n".join(parts)


def measured_here(slug: str) -> str:
    """What the comparisons say of `slug`, beside their baseline; empty where it took part in none."""
    file = RESULTS / "glue.json"
    tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.is_file() else {}
    parts = []
    for name, task in tasks.items():
        own = [row for row in ranked(task) if slug in row["method"].split("+")]
        if own and slug != task["baseline"]:
            shown = [row for row in ranked(task) if row in own or row["method"] == task["baseline"]]
            cells = table(tuple(headings(task)), [tuple(row_cells(task, row)) for row in shown])
            parts.append(f"{name}: {task['task']}, {shown[0]['steps']} steps.\n\n{cells}")
    if not parts:
        return ""
    how = "[The rules and all methods](../benchmarks.md#text-tasks). Each had its learning rate searched."
    return "\n\n".join(["\n\n## Measured here", *parts, how]) + "\n"


def pretraining(found: dict[str, Any]) -> str:
    """The tables, and the curves of each arm at its rate, mean of the seeds."""
    curves = {}
    for name, runs in found["data"].items():
        chosen = [run["validation"] for run in runs if run["rate"] == runs[-1]["rate"]]
        curves[name] = {float(step): fmean(run[step] for run in chosen) for step in chosen[0]}
    return f"{measured(found)}\n\n{svg(curves, 'step', 'validation loss, nats a byte', top=3.5)}"


def study(found: dict[str, Any]) -> str:
    """The arms of a study, each at the rate and scale that its search found, against the first of them."""
    rows, screened = [], []
    for name, arm in found["arms"].items():
        if not arm["runs"]:
            screened.append((name, f"{arm['rate']:g}", f"{arm['scale']:g}", f"{arm['lead']:+.3f}"))
            continue
        finals = [run["final"] for run in arm["runs"] if run["seed"] < 1000]
        gap = arm["against_lora"]
        half = "" if gap["half"] is None else f" ± {gap['half']:.3f}"
        values = " ".join(f"{value:.3f}" for value in finals)
        reached = str(arm["steps_to_lora"] or "not reached")
        mean = f"{sum(finals) / len(finals):.3f}"
        rows.append((name, f"{arm['rate']:g}", f"{arm['scale']:g}", values, mean, f"{gap['mean']:+.3f}{half}", reached))
    head = ("arm", "rate", "scale", "seeds", "mean", "against LoRA, paired", "steps to LoRA's end")
    about = f"`{found['command']}`, {found['date']}, r = {found['r']}, {found['steps']} steps, {found['metric']}."
    floor = f"Two sets of LoRA runs under other seeds are {found['noise']['level']:.3f} apart (root mean square)."
    parts = [about, table(head, rows), floor]
    if screened:
        parts += [
            "These fell behind LoRA on the held-out rows, on which rate and scale were searched, and ended there:",
            table(("arm", "rate", "scale", "against LoRA, held out, one seed"), screened),
        ]
    return "\n\n".join(parts)
