"""`loratlas compare`: several methods on the same work, with a leaderboard and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from loratlas.commands import options
from loratlas.commands.output import console, error_console, print_json
from loratlas.errors import UserError

_RULES, _RUNNING = "Rules of the comparison", "Running"

EXAMPLES = """[bold]Examples[/]

loratlas compare lora pissa srlora --demo

loratlas compare peft-lora srlora --model FacebookAI/roberta-base --data glue:cola --metric matthews

loratlas compare lora srlora --demo --seeds 3 --lr-grid 1e-3,3e-3 --set r=4 --set srlora.r_target=64

loratlas compare lora lora+lora-pro galore lisa --demo

loratlas compare lora srlora --model my/model --data reviews.csv --processes 2 --base-task pairs.jsonl
"""


def compare(
    methods: Annotated[
        list[str],
        typer.Argument(help="Slugs of `loratlas methods`, or lora, pissa, peft-lora; together as srlora+lora-pro."),
    ],
    demo: options.Demo = False,
    model: options.Model = None,
    settings: options.Set = None,
    data: options.Data = None,
    test: options.Test = None,
    forget: options.Forget = None,
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
    group_by_length: options.GroupByLength = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Training time of a run instead of --steps; a short trial fixes the steps.", rich_help_panel=_RULES
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs of each method, with seeds 0, 1, ... Else 3; 1 with --demo.", rich_help_panel=_RULES
        ),
    ] = None,
    lr_grid: Annotated[
        str | None,
        typer.Option(
            help="Learning rates to try with every method on held-out training rows. Else 1e-3,2e-3,4e-3,8e-3; none "
            "with --demo or --learning-rate.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    no_tune: Annotated[
        bool, typer.Option("--no-tune", help="No search: the catalogue's learning rates.", rich_help_panel=_RULES)
    ] = False,
    widen: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learning rates to try beyond the grid with a method, while its best is the outermost.",
            rich_help_panel=_RULES,
        ),
    ] = 2,
    search_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of a run of the search. Else those of the final runs.", rich_help_panel=_RULES),
    ] = None,
    noise_floor: Annotated[
        bool | None,
        typer.Option(
            "--noise-floor/--no-noise-floor",
            help="Run the baseline again under other seeds. Else with two seeds or more.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The method that the others are measured against. Else lora, or the first.", rich_help_panel=_RULES
        ),
    ] = None,
    base_task: Annotated[
        str | None,
        typer.Option(
            help="Old work of the base model, measured before and after: texts, or for encoders pairs with a score.",
            rich_help_panel=_RULES,
        ),
    ] = None,
    base_test: Annotated[
        str | None, typer.Option(help="Rows of --base-task: a file or a split's name.", rich_help_panel=_RULES)
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Runs at the same time, in local processes.", rich_help_panel=_RUNNING)
    ] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Ray cluster for the runs: auto, local or an address.", rich_help_panel=_RUNNING)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints to resume from.", rich_help_panel=_RUNNING)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --out; finished runs are kept.", rich_help_panel=_RUNNING)
    ] = False,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare methods on the same data: learning rate searched for each, several seeds, intervals, a verdict.

    Writes results.json after every run, report.html at the end, and each trained adapter.
    """
    with error_console().status("reading model and data"):
        from loratlas.train.compare import compare as compare_methods
        from loratlas.train.console import ConsoleProgress, leaderboard
        from loratlas.train.forgetting import BaseTask
        from loratlas.train.report import check_plotly, write_report
        from loratlas.train.spec import RunSpec
        from loratlas.train.stages import RESULTS

        check_plotly()
        grid = _grid(lr_grid, learning_rate, no_tune=no_tune, demo=demo)
        shared, own = options.parse_settings(settings, methods)
        if resume and out is None:
            raise UserError("--resume needs --out: the directory of the comparison to go on with.")
        directory = options.output_directory(out, "demo" if demo else "compare")
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
            forget=forget,
        )
    spec = RunSpec(
        method="",
        model=work.base,
        output_dir=str(directory),
        steps=steps,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        learning_rate=learning_rate,
        lr_scheduler=lr_scheduler,
        eval_every=eval_every,
        calibrate_steps=calibrate_steps,
        bf16=bf16,
        group_by_length=group_by_length,
        save_every=save_every,
        options=shared,
    )
    with ConsoleProgress(error_console()) as progress:
        result = compare_methods(
            methods,
            spec,
            work,
            seeds=range(seeds or (1 if demo else 3)),
            grid=grid,
            widen=widen,
            search_steps=search_steps,
            minutes=minutes,
            noise_floor=noise_floor,
            options=own,
            baseline=baseline,
            base_task=BaseTask(base_task, base_test, max_length or 128) if base_task else None,
            processes=processes,
            cluster=cluster,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    report = write_report(result.to_dict(), directory / "report.html", _command())
    if as_json:
        print_json(result.to_dict())
    else:
        console().print(leaderboard(result))
        console().print(f"\nReport: {report}\nNumbers: {directory / RESULTS}", markup=False, soft_wrap=True)


def _grid(text: str | None, rate: float | None, *, no_tune: bool, demo: bool) -> list[float] | None:
    """What `compare` calls grid."""
    if text is not None and no_tune:
        raise UserError("--lr-grid searches and --no-tune does not: give one of them.")
    if text is None:
        return [] if (no_tune or demo) and rate is None else None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--lr-grid {text} is no list of numbers such as 1e-3,3e-3.") from None


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
