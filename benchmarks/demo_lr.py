"""Where the catalogue's learning rates come from: a grid on the demo's task, on rows held out of its training rows.

    python benchmarks/demo_lr.py lora pissa srlora peft-lora --out runs/demo-lr

The demo's own test rows are never looked at. Prints one line a method and rate, and writes all runs as JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratlas.commands.quiet import quiet_libraries
from loratlas.files import write_json

GRID = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)


def main(
    methods: list[str],
    out: Annotated[Path, typer.Option(help="Directory of the runs; rates.json in it holds all of them.")],
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates instead of the grid.")] = None,
    steps: int = 150,
    seed: int = 1,
) -> None:
    quiet_libraries()
    from loratlas.train import demo
    from loratlas.train.compare import compare
    from loratlas.train.data import load_task
    from loratlas.train.run import RunSpec, prepare_output
    from loratlas.train.tables import Tables

    prepare_output(out)
    halves = demo.docstrings().train.train_test_split(test_size=500, seed=seed)
    tables = Tables(halves["train"], halves["test"], "held out of the training rows")
    model = demo.demo_model()
    task = load_task(tables, model, name=demo.NAME, max_length=demo.MAX_LENGTH)
    rows = []
    for each in rate or GRID:
        spec = RunSpec("", model, str(out / f"{each:g}"), steps=steps, learning_rate=each, eval_every=steps)
        for run in compare(methods, spec, task, seeds=[seed]).runs:
            keys = ("method", "learning_rate", "seed", "steps", "final", "step_seconds", "diverged_at")
            rows.append({key: getattr(run, key) for key in keys})
            typer.echo(f"{run.method:12} {each:6g}  {run.metric} {run.final:.4f}")
            write_json(out / "rates.json", rows)


if __name__ == "__main__":
    typer.run(main)
