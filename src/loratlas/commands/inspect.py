"""`loratlas inspect`: what an adapter holds, without loading its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from loratlas.commands import by_rank as ranked
from loratlas.commands import options
from loratlas.commands.output import console, print_json

if TYPE_CHECKING:
    from loratlas.analysis.inspect import Inspection, TensorEntry

EXAMPLES = """[bold]Examples[/]

loratlas inspect runs/mine

loratlas inspect runs/mine --tensors

loratlas inspect runs/mine --by-rank

loratlas inspect path/to/any/peft/adapter --json
"""

_BARS = "▁▂▃▄▅▆▇█"
_SPECTRUM = 12  # singular values drawn a layer: what fits a line
_AGES = (1, 2, 3, 4, 5, 10)  # of fresh pairs, likewise
_MOMENTS = 20  # of a run, likewise


_BY_RANK = "By rank"


def inspect(
    ctx: typer.Context,
    directory: Annotated[Path, typer.Argument(help="An adapter folder, or the output directory of `loratlas train`.")],
    every_tensor: Annotated[
        bool, typer.Option("--tensors", help="List every tensor of the file instead of sums by name.")
    ] = False,
    by_rank: Annotated[
        bool,
        typer.Option(
            "--by-rank",
            help="Evaluate the adapter at every rank instead, on the test rows of its run or of --data.",
            rich_help_panel=_BY_RANK,
        ),
    ] = False,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="A rank to look at, several times for several. Else all up to 16, then powers of two.",
            rich_help_panel=_BY_RANK,
        ),
    ] = None,
    demo: options.Demo = False,
    model: options.Model = None,
    data: options.Data = None,
    test: options.Test = None,
    task: options.TaskName = None,
    text_column: options.TextColumn = None,
    label_column: options.LabelColumn = None,
    metric: options.Metric = None,
    max_length: options.MaxLength = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what an adapter is made of: method, size by tensor, and how much each layer changes.

    Works on any PEFT adapter; the base model is not loaded. With --by-rank it is, and the adapter is evaluated at every
    rank: each row is what `loratlas export --rank N` ships.
    """
    if by_rank:
        return ranked.show(directory, ctx, rank, demo=demo, as_json=as_json)
    ranked.refuse_options(ctx, rank, demo=demo)
    from loratlas.analysis.inspect import inspect_adapter

    found = inspect_adapter(directory)
    if as_json:
        print_json(found)
    else:
        console().print(_page(found, every_tensor))


def _page(found: Inspection, every_tensor: bool) -> Group:
    parts: list[RenderableType] = [_summary(found), _file(found, every_tensor)]
    if any(layer.norm is not None for layer in found.layers):
        parts.append(_layers(found))
    if found.ranks:
        parts.append(_ranks(found))
    if found.recomposition:
        parts.append(_recomposition(found))
    return Group(*parts)


def _summary(found: Inspection) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    targets = found.target_modules
    rows = {
        "adapter": found.directory,
        "method": f"{found.method} ({found.peft_type})",
        "base model": found.base_model or "not recorded",
        "task": found.task_type or "not recorded",
        "rank": _plain(found.rank),
        "lora_alpha": _plain(found.alpha),
        "target modules": ", ".join(targets) if isinstance(targets, list) else _plain(targets),
        "saved along": ", ".join(found.modules_to_save) or "nothing",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _plain(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _file(found: Inspection, every_tensor: bool) -> Table:
    table = _table(f"The file: {_bytes(found.file_bytes)} in {len(found.tensors)} tensors ({_by_role(found)})")
    table.add_column("tensor", overflow="fold")
    table.add_column("role", no_wrap=True)
    table.add_column("shape" if every_tensor else "count", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, group in _grouped(found, every_tensor).items():
        size = sum(entry.bytes for entry in group)
        number = "x".join(map(str, group[0].shape)) or "scalar" if every_tensor else str(len(group))
        share = size / found.file_bytes if found.file_bytes else 0.0
        table.add_row(escape(name), group[0].role, number, group[0].dtype, f"{size:,}", f"{share:.1%}")
    return table


def _by_role(found: Inspection) -> str:
    sizes: dict[str, int] = {}
    for entry in sorted(found.tensors, key=lambda entry: entry.role):
        sizes[entry.role] = sizes.get(entry.role, 0) + entry.bytes
    return ", ".join(f"{role} {_bytes(size)}" for role, size in sizes.items())


def _grouped(found: Inspection, every_tensor: bool) -> dict[str, list[TensorEntry]]:
    """Tensors by full name, or the adapter's own by their last name so that all layers make one line."""
    groups: dict[str, list[TensorEntry]] = {}
    modules = sorted((layer.module for layer in found.layers), key=len, reverse=True)
    for entry in sorted(found.tensors, key=lambda entry: entry.role):
        module = next((m for m in modules if entry.name.startswith(f"{m}.")), None)
        short = entry.name.removeprefix(f"{module}.") if module and not every_tensor else entry.name
        groups.setdefault(short, []).append(entry)
    return groups


def _layers(found: Inspection) -> Table:
    table = _table("The update of each layer, delta = W' - W")
    table.caption = f"norm: Frobenius. spectrum: the largest {_SPECTRUM} singular values relative to the first."
    table.add_column("module", overflow="fold")
    table.add_column("out x in", justify="right", no_wrap=True)
    table.add_column("r", justify="right", no_wrap=True)
    table.add_column("norm", justify="right", no_wrap=True)
    table.add_column("effective\nrank", justify="right")
    table.add_column("spectrum", no_wrap=True)
    for layer in found.layers:
        if layer.shape is None or layer.singular_values is None:
            table.add_row(escape(layer.module), "-", str(layer.rank), "-", "-", "-")
            continue
        numbers = ("x".join(map(str, layer.shape)), str(layer.rank), f"{layer.norm:.4g}", f"{layer.effective_rank:.1f}")
        table.add_row(escape(layer.module), *numbers, _spectrum(layer.singular_values))
    return table


def _spectrum(values: list[float]) -> str:
    """Bars of the largest values relative to the first."""
    return "".join(_bar(value / values[0]) for value in values[:_SPECTRUM])


def _bar(share: float) -> str:
    return _BARS[min(7, int(8 * share))]


def _ranks(found: Inspection) -> Table:
    from loratlas.analysis.ranks import rank_at

    last = max(1, *(entry["steps"][-1] for entry in found.ranks))
    most = max(1, *(rank for entry in found.ranks for rank in entry["ranks"]))
    total = sum(entry["ranks"][-1] for entry in found.ranks)
    table = _table(f"The rank of each layer: {total} in all, {total / len(found.ranks):.3g} on average")
    table.caption = f"over time: from the start to step {last}, the last that moved a rank; a full bar is rank {most}."
    table.add_column("module", overflow="fold")
    table.add_column("rank now", justify="right", no_wrap=True)
    table.add_column("over time", no_wrap=True)
    table.add_column("moved at step", overflow="fold")
    moments = [round(last * i / (_MOMENTS - 1)) for i in range(_MOMENTS)]
    for entry in found.ranks:
        bars = "".join(_bar(rank_at(entry, step) / most) for step in moments)
        moves = " ".join(f"{step}:{rank}" for step, rank in zip(entry["steps"][1:], entry["ranks"][1:], strict=True))
        table.add_row(escape(entry["layer"]), str(entry["ranks"][-1]), bars, moves or "-")
    return table


def _recomposition(found: Inspection) -> Table:
    table = _table("Recomposition: which directions of W (0 is the largest) the slots carry now")
    table.add_column("module", overflow="fold")
    table.add_column("events", justify="right", no_wrap=True)
    table.add_column("directions\nused", justify="right")
    table.add_column("after steps", overflow="fold")
    table.add_column("slots", overflow="fold")
    table.caption = _fresh(found)
    for state in found.recomposition:
        steps = [str(event["step"]) for event in found.events if event["layer"] == state["layer"]]
        used = f"{state['directions_used']} of {state['directions_total']}"
        slots = " ".join(map(str, state["slot_directions"]))
        table.add_row(escape(state["layer"]), str(state["events"]), used, " ".join(steps) or "-", slots)
    return table


def _fresh(found: Inspection) -> str | None:
    """The learning rate of fresh pairs in the first steps after the last event."""
    if not found.fresh or not found.fresh[-1]["ages"]:
        return None
    ages, factors = found.fresh[-1]["ages"], found.fresh[-1]["factors"]
    shown = "  ".join(f"{age}: {factor:.2g}" for age, factor in zip(ages, factors, strict=True) if age in _AGES)
    return f"Under Adam, pairs that start again move with this multiple of the others' learning rate, by age: {shown}"


def _table(title: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption_justify = "left"
    return table


def _bytes(size: int) -> str:
    for unit, step in (("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"
