"""`loratlas inspect --by-rank`: what an adapter scores and weighs at every rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loratlas.commands import options
from loratlas.commands.output import console, error_console, print_json
from loratlas.errors import UserError

if TYPE_CHECKING:
    from loratlas.analysis.adapter_folder import AdapterFolder
    from loratlas.train.by_rank import AtRank, ByRank, RankTable
    from loratlas.train.spec import RunSpec
    from loratlas.train.work import Work

_BAR = 20


def show(directory: Path, ctx: typer.Context, ranks: list[int] | None, *, demo: bool, as_json: bool) -> None:
    """Evaluate the adapter in `directory` at its ranks and print the table."""
    with error_console().status("loading the adapter, its base model and the data"):
        from loratlas.analysis.adapter_folder import read_adapter
        from loratlas.train.by_rank import RankTable

        folder = read_adapter(directory)
        work, spec = _what(directory, folder, options.typed(ctx), demo=demo)
        table = RankTable(folder, work.load(), spec, ranks)
    _evaluate(table)
    if as_json:
        print_json(table.found)
    else:
        console().print(_table(table.found))


def refuse_options(ctx: typer.Context, ranks: list[int] | None, *, demo: bool) -> None:
    """Raise `UserError` for options that have no use without --by-rank."""
    if options.typed(ctx) or ranks or demo:
        raise UserError("--rank, --data and their like say what to evaluate: add --by-rank, or leave them out.")


def _what(directory: Path, folder: AdapterFolder, typed: dict[str, Any], *, demo: bool) -> tuple[Work, RunSpec]:
    """Model and data of the run that has left its recipe; what was typed comes before that, or stands alone."""
    from loratlas.train.recipe import DEMO
    from loratlas.train.recipe_file import CONFIG, read_recipe
    from loratlas.train.spec import RunSpec
    from loratlas.train.work import Work

    values = {**({"data": DEMO} if demo else {}), **typed}
    recipe = next(
        (place / CONFIG for place in (directory, folder.directory.parent) if (place / CONFIG).is_file()), None
    )
    if recipe is not None:
        read = read_recipe(recipe, values)
        return read.work(), read.spec("", read.work().base)
    if "data" not in values:
        raise UserError(
            f"{directory} has no {CONFIG} that would name the data of its run: give the rows to evaluate on with "
            "--data, or --demo."
        )
    rows = {"batch_size": values.pop("batch_size", 32)}
    base = folder.config.get("base_model_name_or_path")
    work = Work(**{"model": base, **values, "data": None if values["data"] == DEMO else values["data"]})
    return work, RunSpec(str(folder.config["peft_type"]).lower(), work.base, "", **rows)


def _evaluate(table: RankTable) -> None:
    err, metric = error_console(), table.found.metric
    err.print(table.found.data, markup=False)
    columns = (TextColumn("rank {task.fields[rank]}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[said]}"), console=err) as bars:
        ranks = table.found.ranks
        bar = bars.add_task("", total=len(ranks), rank=ranks[0], said="")
        for done, row in enumerate(table.rows(), start=1):
            said = f"{metric} {row.metrics[metric]:.4f}"
            bars.update(bar, completed=done, rank=ranks[min(done, len(ranks) - 1)], said=said)


def _table(found: ByRank) -> Table:
    table = Table(
        title=f"\n{found.method} at every rank", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.pad_edge, table.caption_justify = False, "left"
    table.caption = Text(_caption(found))
    for name in ("rank", found.metric):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    values = [row.metrics[found.metric] for row in found.rows]
    for row, value in zip(found.rows, values, strict=True):
        table.add_row(str(row.rank), f"{value:.4f}", _bar(value, values), f"{row.bytes:,}", _error(row))
    return table


def _caption(found: ByRank) -> str:
    how = (
        "the adapter was trained at every rank, and each is exact."
        if found.nested
        else "smaller ranks are the best approximation of each layer's update; error: of that, relative."
    )
    return f"{how} bytes: of `loratlas export --rank N --ranks each`."


def _bar(value: float, values: list[float]) -> str:
    """From nothing at the smallest value of the table to a full bar at the largest."""
    low, high = min(values), max(values)
    return "█" * (_BAR if high == low else round(_BAR * (value - low) / (high - low)))


def _error(row: AtRank) -> str:
    return "exact" if row.relative_error == 0 else f"{row.relative_error:.1e}"
