"""`loratlas train`: one method on one model and data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratlas.commands import options
from loratlas.commands.output import console, error_console, print_json
from loratlas.errors import UserError

if TYPE_CHECKING:
    from loratlas.train.recipe import Recipe
    from loratlas.train.results import RunResult

EXAMPLES = """[bold]Examples[/]

loratlas train srlora --demo

loratlas init srlora --out srlora.yaml; loratlas train srlora.yaml --steps 500

loratlas train srlora --model FacebookAI/roberta-base --data glue:sst2

loratlas train lora --model my/model --data stars.csv --task regression

loratlas train srlora --optimizer lora-pro --objective ba-lora --demo

loratlas train lora --objective loku --model my/model --data keep.jsonl --forget forget.jsonl --task causal-lm

loratlas train lisa --demo
"""


def train(
    ctx: typer.Context,
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="A slug of `loratlas methods`, or lora, pissa, peft-lora; several as srlora+lora-pro; or a recipe of "
            "`loratlas init` (.yaml).",
        ),
    ],
    demo: options.Demo = False,
    model: options.Model = None,
    optimizer: options.Optimizer = None,
    objective: options.Objective = None,
    strategy: options.Strategy = None,
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
    seed: options.Seed = 0,
    save_every: options.SaveEvery = None,
    report_to: options.ReportTo = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a model with one method.

    Writes the adapter (for PEFT), result.json and config.yaml, the recipe. A method that trains the base model's own
    weights (galore, lisa) writes the whole model; an optimizer or objective that needs an adapter runs on plain LoRA.
    """
    if resume and out is None:
        raise UserError("--resume needs --out: the directory of the run to go on with.")
    recipe = _recipe(method, options.typed(ctx), settings, demo=demo)
    with error_console().status("reading model and data"):
        from loratlas.train.console import ConsoleProgress
        from loratlas.train.output import prepare_output
        from loratlas.train.recipe_check import raise_any
        from loratlas.train.reporters import check_reporters
        from loratlas.train.roles import cast
        from loratlas.train.run import run
        from loratlas.train.stop import Stop, Stopped

        check_reporters(recipe.report_to)
        members = cast(recipe)
        raise_any([text for _, text in members.lacking(vars(recipe))])
        directory = options.output_directory(out, members.name)
        work = recipe.work()
        loaded = work.load()
        if not resume:
            prepare_output(directory, overwrite=overwrite)
    spec = recipe.spec(str(directory), work.base)
    error_console().print(loaded.description, markup=False)
    try:
        with ConsoleProgress(error_console()) as progress, Stop() as stop:
            result = run(spec, loaded, progress, resume=resume, stop=stop)
    except Stopped as stopped:
        where = f"stopped after step {stopped.step}; the checkpoint is in {stopped.checkpoint}"
        command = f"go on with: {_go_on(sys.argv[1:], directory)}"
        error_console().print(f"{where}\n{command}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print_json(result)
    else:
        console().print(_summary(result), markup=False, soft_wrap=True)
    if result.diverged_at is not None:
        raise UserError(
            f"the loss or gradient was not finite at step {result.diverged_at}: the state after the step before is in "
            f"{result.adapter_dir or result.model_dir}; try a lower --learning-rate than {result.learning_rate:g}."
        )


def _go_on(arguments: list[str], directory: Path) -> str:
    """The command that resumes the run that `arguments` started in `directory`."""
    kept = [word for word in arguments if word not in ("--overwrite", "--resume")]
    if not any(word.split("=")[0] == "--out" for word in kept):
        kept += ["--out", str(directory)]
    return shlex.join(["loratlas", *kept, "--resume"])


def _recipe(method: str, typed: dict[str, Any], settings: list[str] | None, *, demo: bool) -> Recipe:
    """The recipe of a file or of the command line alone; what was typed comes before what the file says."""
    from loratlas.train.recipe import DEMO
    from loratlas.train.recipe_check import make, merged, placed
    from loratlas.train.recipe_file import SUFFIXES, read_recipe

    shared, own = options.parse_settings(settings)
    values = {**({"model": DEMO, "data": DEMO} if demo else {}), **typed, **({"options": shared} if shared else {})}
    if method.endswith(SUFFIXES):
        return read_recipe(method, values, own)
    options.require_work(values.get("model"), values.get("data"), values.get("forget"))
    named = {**values, "method": method}
    return make(merged(named, placed(named, own)))


def _summary(result: RunResult) -> str:
    share = result.trainable_parameters / result.total_parameters
    used = "" if result.used_parameters is None else f", of which {result.used_parameters:,} in use at the end"
    lines = [
        f"{result.label}: {result.metric} {result.final:.4f} after {result.steps} steps at learning rate "
        f"{result.learning_rate:g}, {result.trainable_parameters:,} trainable parameters ({share:.2%}){used}, "
        f"{1000 * result.step_seconds:.0f} ms a step.",
        *result.remarks,
    ]
    if result.forget is not None:
        before, after = (result.forget[name] for name in ("before", "after"))
        lines.append(f"Forget set, {result.forget['rows']} rows: loss {before:.4f} before and {after:.4f} after.")
    if result.model_dir:
        lines += [f"Model:   {result.model_dir}", f"Try it:  loratlas try {result.model_dir}"]
    else:
        lines += [f"Adapter: {result.adapter_dir}", f"Try it:  loratlas try {result.adapter_dir}"]
        lines += [f"Ship it: loratlas export {result.adapter_dir} --to lora --out {result.adapter_dir}-lora"]
    return "\n".join(lines)
