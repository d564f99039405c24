"""`loratlas try`: answers of a trained adapter or model, beside those of its base model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from loratlas.commands.output import console, error_console
from loratlas.errors import UserError

if TYPE_CHECKING:
    from loratlas.train.answer import Answer, Answerer

EXAMPLES = """[bold]Examples[/]

loratlas try runs/srlora "Return the sine of x (measured in radians)."

loratlas try runs/srlora

loratlas try runs/srlora --json < texts.txt

loratlas try runs/photos cat.png dog.png
"""


def try_(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="An adapter or model folder, or the output directory of `loratlas train`."),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            help="Texts (a pair: with a tab between), or image files. Else they are asked for, or read from a pipe.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Base model (name or path), if it is not where the adapter's config says."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest continuation of a language model.")
    ] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Ask a trained adapter or model, and see what the base model says without it.

    Without TEXT it reads lines: typed (an empty one ends) or from a pipe.
    """
    with error_console().status("loading the adapter on its base model"):
        from loratlas.analysis.adapter_folder import find_whole_model, read_adapter
        from loratlas.train.answer import Answerer

        answerer = Answerer(find_whole_model(directory) or read_adapter(directory), base, max_new_tokens)
    if answerer.new and not as_json:
        error_console().print(
            "The base model has no head for this task, so there is no answer of its own to show.", style="dim"
        )
    typing = not texts and sys.stdin.isatty()
    for item in texts or _lines(typing):
        try:
            before, after = answerer.answer(item)
        except UserError as error:
            if not typing:
                raise
            error_console().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            continue
        if as_json:
            typer.echo(json.dumps(_record(item, answerer, before, after), ensure_ascii=False))
        else:
            _show(item, before, after, repeat=not typing)


def _lines(typing: bool) -> Iterator[str]:
    """Lines of standard input without their ends; empty ones end a dialogue and are skipped in a pipe."""
    while True:
        if typing:
            error_console().print("[bold]>[/] ", end="")
        line = sys.stdin.readline()
        text = line.rstrip("\r\n")
        if not line or (typing and not text.strip()):
            return
        if text.strip():
            yield text


def _show(item: str, before: Answer | None, after: Answer, *, repeat: bool) -> None:
    out = console()
    if repeat:
        out.print(item.replace("\t", "  |  "), style="bold", markup=False, soft_wrap=True)
    for name, answer in (("base", before), ("adapted", after)):
        if answer is not None:
            out.print(f"  {name:<8} {_words(answer)}", markup=False, soft_wrap=True)


def _words(answer: Answer) -> str:
    if answer.text is not None:
        return answer.text.strip() or "(nothing)"
    if answer.value is not None:
        return f"{answer.value:.4g}"
    return "   ".join(f"{label} {probability:.1%}" for label, probability in answer.top)


def _record(item: str, answerer: Answerer, before: Answer | None, after: Answer) -> dict[str, Any]:
    field = "image" if answerer.task == "image-classification" else "text"
    pair = field == "text" and answerer.task != "causal-lm" and "\t" in item
    return {field: item.split("\t", 1) if pair else item, "base": _plain(before), "adapted": _plain(after)}


def _plain(answer: Answer | None) -> dict[str, Any] | None:
    """Only what this task's answers have."""
    if answer is None:
        return None
    if answer.text is not None:
        return {"text": answer.text}
    if answer.value is not None:
        return {"value": answer.value}
    return {"label": answer.label, "top": [{"label": label, "probability": p} for label, p in answer.top]}
