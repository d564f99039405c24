"""What `train` and `compare` share: the options for model, data and training, and what they mean."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratlas.errors import UserError
from loratlas.train.yaml_text import parse_value

if TYPE_CHECKING:
    from loratlas.train.work import Work

_MODEL, _DATA, _TRAINING = "Model", "Data", "Training"
_OTHER_NAMES = {"accumulation": "gradient_accumulation", "text_column": "text_columns"}  # parameters and their fields

Demo = Annotated[
    bool, typer.Option("--demo", help="A small real model and real texts that come with the package: no download.")
]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Base model: hub id or folder.", rich_help_panel=_MODEL)
]
Optimizer = Annotated[
    str | None,
    typer.Option(metavar="SLUG", help="Optimizer of the catalogue. Else AdamW.", rich_help_panel=_MODEL),
]
Objective = Annotated[
    str | None,
    typer.Option(metavar="SLUG", help="Objective of the catalogue. Else the task's own loss.", rich_help_panel=_MODEL),
]
Strategy = Annotated[
    str | None,
    typer.Option(metavar="SLUG", help="Strategy of the catalogue: what trains when.", rich_help_panel=_MODEL),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[SLUG.]NAME=VALUE",
        help="Option of the method, as r=16, or of what the slug says, as srlora.gamma=0.25; several times.",
        rich_help_panel=_MODEL,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="JSONL, CSV, Parquet or text file; a folder of these or of images; a hub dataset as NAME or NAME:CONFIG.",
        rich_help_panel=_DATA,
    ),
]
Test = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|SPLIT",
        help="Test rows: a file or a split's name. Else a validation or test split, or a tenth of the rows.",
        rich_help_panel=_DATA,
    ),
]
Forget = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Rows to forget, beside --data, for objectives that unlearn.", rich_help_panel=_DATA
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="text-classification, regression, causal-lm or image-classification. Else read off the columns.",
        rich_help_panel=_DATA,
    ),
]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Column with the text; twice for pairs of texts.", rich_help_panel=_DATA),
]
LabelColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Column with the label.", rich_help_panel=_DATA)]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC",
        help="accuracy, f1 or matthews; pearson, spearman or mse; perplexity or nll. Else the first of the task.",
        rich_help_panel=_DATA,
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Longest text in tokens. Default 128.", rich_help_panel=_DATA)
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Use only so many rows of each part.", rich_help_panel=_DATA)
]
Steps = Annotated[int, typer.Option(min=1, metavar="N", help="Optimizer steps.", rich_help_panel=_TRAINING)]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows in a batch.", rich_help_panel=_TRAINING)]
Accumulation = Annotated[
    int,
    typer.Option(
        "--gradient-accumulation", min=1, metavar="N", help="Batches to an optimizer step.", rich_help_panel=_TRAINING
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(metavar="RATE", help="Peak learning rate. Else the catalogue's.", rich_help_panel=_TRAINING),
]
Scheduler = Annotated[
    str,
    typer.Option("--lr-scheduler", metavar="NAME", help="linear, cosine, constant, ...", rich_help_panel=_TRAINING),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Steps between evaluations. Else a fifth.", rich_help_panel=_TRAINING),
]
CalibrateSteps = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Batches to look at before training, for methods whose start follows the data.",
        rich_help_panel=_TRAINING,
    ),
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Mixed precision with bfloat16.", rich_help_panel=_TRAINING)]
GroupByLength = Annotated[
    bool,
    typer.Option(
        "--group-by-length",
        help="Texts of like lengths share a batch: less padding, faster, other batches.",
        rich_help_panel=_TRAINING,
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything random.", rich_help_panel=_TRAINING)]
SaveEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Steps between checkpoints to resume from.", rich_help_panel=_TRAINING),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Report to tensorboard, wandb, ... as well; several times for several.",
        rich_help_panel=_TRAINING,
    ),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Directory to write. Else a new one below runs/.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to standard error.")]


def read_work(
    *,
    demo: bool,
    model: str | None,
    data: str | None,
    test: str | None,
    task: str | None,
    text_columns: list[str] | None,
    label_column: str | None,
    metric: str | None,
    max_length: int | None,
    limit: int | None,
    forget: str | None,
) -> Work:
    """The model and data that the options name; nothing is loaded yet.

    Raises:
        UserError: neither --demo nor --model and --data.
    """
    if not demo:
        require_work(model, data, forget)
    from loratlas.train.work import Work

    columns = tuple(text_columns or ())
    return Work(model, data, test, task, columns, label_column, metric, max_length, limit, forget)


def require_work(model: str | None, data: str | None, forget: str | None = None) -> None:
    """Raise `UserError` unless there are both."""
    if forget is not None and data is None:
        raise UserError("--data missing: --forget is a set beside the rows to keep, which --data names.")
    missing = " and ".join(name for name, value in (("--model", model), ("--data", data)) if value is None)
    if missing:
        raise UserError(f"{missing} missing: give a model and data, or try it with --demo.")


def typed(ctx: typer.Context) -> dict[str, Any]:
    """The fields of a recipe that were given on the command line; defaults are left to the recipe."""
    from loratlas.train.recipe import Recipe

    fields = {field.name: field.name for field in dataclasses.fields(Recipe)} | _OTHER_NAMES
    typed_in = {name: v for name, v in ctx.params.items() if _source(ctx, name) not in (None, "DEFAULT")}
    return {fields[name]: value for name, value in typed_in.items() if name in fields and name != "method"}


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return None if source is None else source.name


def parse_settings(
    pairs: list[str] | None, methods: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """--set values as ({option of the method: value}, {slug: {option for it alone: value}}).

    methods: where all that take part are known; plain LoRA may always join.

    Raises:
        UserError: not NAME=VALUE, a value that is not YAML, or a slug that takes no part in `methods`.
    """
    known = {"lora", *(slug for method in methods or () for slug in method.split("+"))}
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair} is not NAME=VALUE, for example --set r=16.")
        try:
            value = parse_value(text)
        except ValueError:
            raise UserError(f"--set {pair}: the value is not YAML; quote it.") from None
        slug, dot, option = name.partition(".")
        if dot and methods is not None and slug not in known:
            raise UserError(f"--set {pair}: {slug} is not among the methods {', '.join(methods)}.")
        if dot:
            own.setdefault(slug, {})[option] = value
        else:
            shared[name] = value
    return shared, own


def output_directory(out: Path | None, name: str) -> Path:
    """`out`, or the first of runs/NAME, runs/NAME-2, ... that is free."""
    if out is not None:
        return out
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("runs") / each for each in names) if not path.exists())
