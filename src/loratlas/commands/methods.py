"""`loratlas methods`: the catalogue as a table."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from loratlas.catalog import KINDS, System, baselines, systems
from loratlas.commands.output import console, print_json
from loratlas.errors import UserError

EXAMPLES = """[bold]Examples[/]

loratlas methods 'lora*'

loratlas methods --kind optimizer --implemented

loratlas methods srlora --json
"""


def methods(
    pattern: Annotated[str, typer.Argument(help="Show only names that match, for example 'lora*' or srlora.")] = "*",
    kind: Annotated[str | None, typer.Option(help=f"Show only one kind: {', '.join(KINDS)}.")] = None,
    implemented: Annotated[bool, typer.Option("--implemented", help="Leave out what is only planned.")] = False,
    with_baselines: Annotated[
        bool, typer.Option("--baselines", help="List the baselines instead: what the methods are compared with.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the methods of the catalogue: what they are, where they come from, whether they can be used yet.

    The slug is the name that the other commands take.
    """
    found = baselines() if with_baselines else systems(pattern, kind, "implemented" if implemented else None)
    if as_json:
        print_json([system.row() for system in found])
    elif not found:
        raise UserError(f"no method matches {pattern!r}: `loratlas methods` lists them all.")
    else:
        console().print(_table(found))


def _table(found: list[System]) -> Table:
    done = sum(system.status == "implemented" for system in found)
    caption = f"{len(found)} listed, {done} implemented. Train one: loratlas train {_example(found)} --demo"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("slug", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("exports as", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for system in found:
        ready = system.status == "implemented"
        table.add_row(
            f"[bold]{system.slug}[/]" if ready else system.slug,
            escape(system.name),
            system.kind,
            system.paper,
            ", ".join(system.exports),
            "[green]implemented[/]" if ready else "planned",
            escape(system.summary),
            style=None if ready else "dim",
        )
    return table


def _example(found: list[System]) -> str:
    return next((system.slug for system in found if system.status == "implemented"), "srlora")
