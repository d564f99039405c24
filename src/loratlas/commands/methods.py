"""`loratlas methods`: the catalogue as a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from loratlas.catalog import KINDS, System, baselines, find, systems
from loratlas.commands.output import console, print_json
from loratlas.errors import UserError

EXAMPLES = """[bold]Examples[/]

loratlas methods 'lora*'

loratlas methods --kind optimizer --implemented

loratlas methods srlora --json
"""

_WITH_KIND, _WITH_NAME = 110, 150  # columns of the terminal from which these are shown


def methods(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Show only names that match, such as 'lora*' or srlora.")
    ] = "*",
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=f"Show only one kind: {', '.join(KINDS)}.")] = None,
    implemented: Annotated[bool, typer.Option("--implemented", help="Leave out what is only planned.")] = False,
    with_baselines: Annotated[
        bool, typer.Option("--baselines", help="List the baselines instead: what the methods are compared with.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the methods of the catalogue: what they are, where they come from, whether they can be used yet.

    The slug is the name that the other commands take; --json has everything.
    """
    found = baselines() if with_baselines else systems(pattern, kind, "implemented" if implemented else None)
    if not found and not kind and not implemented and not set(pattern) & set("*?["):
        found = [find(pattern)]  # a baseline, or an error with the nearest names
    if as_json:
        print_json([system.row() for system in found])
    elif not found:
        raise UserError(f"no method matches {pattern!r}: `loratlas methods` lists them all.")
    else:
        out = console()
        out.print(_table(found, out.width))


def _table(found: list[System], width: int) -> Table:
    """As many columns as fit: the summary needs room, the kind can head a group, the name repeats the slug."""
    done = sum(system.status == "implemented" for system in found)
    caption = f"{len(found)} listed, {done} implemented (✓). Train one: loratlas train {_example(found)} --demo"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    columns: dict[str, Callable[[System], str]] = {
        "": lambda system: "[green]✓[/]" if system.status == "implemented" else "",
        "slug": lambda system: f"[bold]{system.slug}[/]" if system.status == "implemented" else system.slug,
        **({"name": lambda system: escape(system.name)} if width >= _WITH_NAME else {}),
        **({"kind": lambda system: system.kind} if width >= _WITH_KIND else {}),
        "paper": lambda system: system.paper,
        **({"ships as": lambda system: ", ".join(system.exports)} if width >= _WITH_KIND else {}),
        "what it does": lambda system: escape(system.summary),
    }
    for title in columns:
        table.add_column(title, no_wrap=title != "what it does", overflow="fold")
    for kind, group in itertools.groupby(found, key=lambda system: system.kind):
        if width < _WITH_KIND:
            table.add_row("", f"[bold blue]{kind}[/]")
        for system in group:
            style = None if system.status == "implemented" else "dim"
            table.add_row(*(cell(system) for cell in columns.values()), style=style)
    return table


def _example(found: list[System]) -> str:
    return next((system.slug for system in found if system.status == "implemented"), "srlora")
