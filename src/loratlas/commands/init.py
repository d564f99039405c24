"""`loratlas init`: a commented YAML recipe of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loratlas.commands import options
from loratlas.commands.output import console, error_console
from loratlas.errors import UserError

if TYPE_CHECKING:
    from loratlas.train.roles import Cast

EXAMPLES = """[bold]Examples[/]

loratlas init srlora --out srlora.yaml

loratlas init lora > lora.yaml

loratlas init srlora --optimizer lora-pro

loratlas train srlora.yaml
"""


def init(
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="A slug of `loratlas methods`, or lora, pissa, peft-lora."),
    ],
    optimizer: options.Optimizer = None,
    objective: options.Objective = None,
    strategy: options.Strategy = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write. Else the recipe is printed.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
) -> None:
    """Write a recipe: every setting of a run as YAML, with its meaning.

    It runs as it is, on the model and texts of --demo.
    """
    if out is not None and out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or add --overwrite to replace it.")
    with error_console().status(f"reading the options of {method}"):
        from loratlas.files import write_text
        from loratlas.train.recipe import DEMO
        from loratlas.train.recipe_check import make
        from loratlas.train.recipe_file import to_yaml
        from loratlas.train.roles import cast, with_defaults

        named = {"method": method, "optimizer": optimizer, "objective": objective, "strategy": strategy}
        recipe = with_defaults(make({**named, "model": DEMO, "data": DEMO}))
        members = cast(recipe)
        text = to_yaml(recipe, _title(members, out or Path(f"{members.name}.yaml")))
    if out is None:
        typer.echo(text, nl=False)
        return
    write_text(out, text)
    console().print(f"Recipe: {out}\nRun it: loratlas train {out}", markup=False, soft_wrap=True)


def _title(members: Cast, file: Path) -> str:
    systems = [member.system for member in members.members]
    return (
        "".join(f"{each.name} (https://arxiv.org/abs/{each.paper})\n{each.summary}\n\n" for each in systems)
        + f"  loratlas train {file}                run it\n"
        f"  loratlas train {file} --steps 500    change a value for one run\n\n"
        'A line like "# name: null" is an option that is not set.'
    )
