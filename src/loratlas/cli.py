"""The `loratlas` command: its subcommands, and how errors reach the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from loratlas import __version__
from loratlas.commands import compare, export, init, inspect, methods, train, try_
from loratlas.commands.output import error_console
from loratlas.commands.quiet import quiet_libraries
from loratlas.errors import UserError


class Commands(TyperGroup):
    """Turns what a user can mend into one line and exit status 2, and Ctrl-C into status 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            error_console().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            error_console().print("[yellow]interrupted[/]")
            raise typer.Exit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loratlas {__version__}")
        raise typer.Exit


START = """[bold]Start here[/]

loratlas init srlora --out srlora.yaml

loratlas train srlora.yaml

loratlas try runs/srlora
"""

app = typer.Typer(
    cls=Commands,
    epilog=START,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train, compare and ship parameter-efficient fine-tuning methods on your own model and data."""
    quiet_libraries()


app.command(epilog=methods.EXAMPLES)(methods.methods)
app.command(epilog=init.EXAMPLES)(init.init)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command("try", epilog=try_.EXAMPLES)(try_.try_)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="loratlas")
