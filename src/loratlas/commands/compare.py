"""`loratlas compare`: several methods on the same work, with a leaderboard and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loratlas.commands import options
from loratlas.commands.output import console, error_console, print_json

EXAMPLES = """[bold]Examples[/]

loratlas compare lora pissa srlora --demo

loratlas compare peft-lora srlora --model FacebookAI/roberta-base --data glue:cola --metric matthews --seeds 3

loratlas compare lora srlora --demo --set r=4 --set srlora.r_target=64
"""


def compare(
    methods: Annotated[list[str], typer.Argument(help="Slugs of `loratlas methods`, or lora, pissa, peft-lora.")],
    demo: options.Demo = False,
    model: options.Model = None,
    settings: options.Set = None,
    data: options.Data = None,
    test: options.Test = None,
    task: options.TaskName = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    metric: options.Metric = None,
    max_length: options.MaxLength = None,
    limit: options.Limit = None,
    steps: options.Steps = 150,
    batch_size: options.BatchSize = 32,
    accumulation: options.Accumulation = 1,
    learning_rate: options.LearningRate = None,
    lr_scheduler: options.Scheduler = "linear",
    eval_every: options.EvalEvery = None,
    calibrate_steps: options.CalibrateSteps = 8,
    bf16: options.Bf16 = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds 0, 1, ...")] = 1,
    baseline: Annotated[
        str | None, typer.Option(help="The method that the others are measured against. Else lora, or the first.")
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Train several methods on the same data in the same order for the same steps, and rank them.

    Writes results.json after every run, report.html at the end, and each trained adapter.
    """
    with error_console().status("reading model and data"):
        from loratlas.train.compare import RESULTS, check_methods
        from loratlas.train.compare import compare as compare_methods
        from loratlas.train.console import ConsoleProgress, leaderboard
        from loratlas.train.report import check_plotly, write_report
        from loratlas.train.run import RunSpec, prepare_output

        check_plotly()
        shared, own = options.parse_settings(settings, methods)
        directory = options.output_directory(out, "demo" if demo else "compare")
        training: dict[str, Any] = {
            "steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "learning_rate": learning_rate,
            "lr_scheduler": lr_scheduler,
            "eval_every": eval_every,
            "calibrate_steps": calibrate_steps,
            "bf16": bf16,
            "options": shared,
        }
        check_methods(methods, RunSpec("", "", "", **training), own)
        work = options.read_work(
            demo=demo,
            model=model,
            data=data,
            test=test,
            task=task,
            text_columns=text_column,
            label_column=label_column,
            metric=metric,
            max_length=max_length,
            limit=limit,
        )
        loaded = work.load()
        prepare_output(directory, overwrite=overwrite)
    spec = RunSpec(method="", model=work.base, output_dir=str(directory), **training)
    error_console().print(loaded.description, markup=False)
    with ConsoleProgress(error_console()) as progress:
        result = compare_methods(
            methods, spec, loaded, seeds=range(seeds), options=own, baseline=baseline, progress=progress
        )
    report = write_report(result.to_dict(), directory / "report.html", _command())
    if as_json:
        print_json(result.to_dict())
    else:
        console().print(leaderboard(result))
        console().print(f"\nReport: {report}\nNumbers: {directory / RESULTS}", markup=False, soft_wrap=True)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
