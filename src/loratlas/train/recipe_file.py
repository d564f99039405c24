"""Recipes as commented YAML: read with every mistake and its line, written so that reading gives back the same."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratlas.catalog import find
from loratlas.errors import UserError
from loratlas.files import write_text
from loratlas.train.recipe import Recipe
from loratlas.train.recipe_check import Problem, check, make, raise_any
from loratlas.train.yaml_text import dump_value, parse

if TYPE_CHECKING:
    from loratlas.train.data import TaskData
    from loratlas.train.run import RunSpec

SUFFIXES = (".yaml", ".yml")
CONFIG = "config.yaml"
_YAML = {"None": None, "True": True, "False": False}
_WIDTH, _COMMENT = 110, 32  # columns of a line, and where comments begin


def read_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in `path`.

    Args:
        overrides: values that come before those of the file; "options" are added to the file's, one by one.

    Raises:
        UserError: no such file, not YAML, or everything that is wrong with its values, one line each with its place.
    """
    file = Path(path)
    try:
        document = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {file}; `loratlas init METHOD --out {file}` writes one.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error}.") from None
    ours = dict(overrides or {})
    options = {**_mapping(document.values.get("options")), **ours.get("options", {})}
    values = {**document.values, **ours}
    if isinstance(values.get("options"), dict | None):
        values["options"] = options
    typed = {*ours, *(f"options.{name}" for name in ours.get("options", {}))}

    def place(name: str) -> str:
        if name in typed:
            return "command line: "
        return f"{file}, line {document.lines[name]}: " if name in document.lines else f"{file}: "

    twice = [Problem(name, f"{name} is given twice.") for name in document.twice]
    found = sorted([*twice, *check(values)], key=lambda problem: document.lines.get(problem.name, math.inf))
    raise_any([f"{place(problem.name)}{problem.text}" for problem in found])
    return make(values)


def to_yaml(recipe: Recipe, title: str) -> str:
    """The recipe with a comment on every field; options of the method that are None by default stand there as comments.

    title: lines for the top, without their "# ".
    """
    lines = [f"# {line}".rstrip() for line in title.splitlines()]
    section = ""
    for field in dataclasses.fields(recipe):
        if field.metadata["section"] != section:
            section = field.metadata["section"]
            lines += ["", f"# {section}"] if section not in ("Method", "Options") else [""]
        if field.name != "options":
            lines += _entry("", field.name, getattr(recipe, field.name), field.metadata["help"])
    return "\n".join([*lines, *_options(recipe), ""])


def _options(recipe: Recipe) -> Iterator[str]:
    from loratlas.train.methods import option_fields

    system = find(recipe.method)
    helps = {field.name: field.metadata.get("help", "") for field in option_fields(system)}
    unset = [field.name for field in option_fields(system) if field.default is None]
    yield f"# Options of {system.name}"
    yield "options:" if recipe.options else "options: {}"
    for name in dict.fromkeys([*helps, *recipe.options]):
        if name in recipe.options:
            yield from _entry("  ", name, recipe.options[name], helps.get(name, ""))
        elif name in unset:
            yield from _entry("  # ", name, None, helps[name])


def _entry(start: str, name: str, value: Any, help: str) -> Iterator[str]:
    """`name: value  # help`; the help goes above where it is long or the value is."""
    help = re.sub(r"\b(None|True|False)\b", lambda found: dump_value(_YAML[found[0]]), help)
    text = f"{start}{name}: {dump_value(value)}"
    beside = textwrap.wrap(help, _WIDTH - _COMMENT - 2)
    if len(text) > _COMMENT - 2 or len(beside) > 3:
        indent = start.removesuffix("# ")
        yield from (f"{indent}# {line}" for line in textwrap.wrap(help, _WIDTH - len(indent) - 2))
        yield text
        return
    yield f"{text:<{_COMMENT}}# {beside[0]}" if beside else text
    yield from (f"{'':<{_COMMENT}}# {line}" for line in beside[1:])


def write_config(spec: RunSpec, task: TaskData, rate: float, options: dict[str, Any]) -> None:
    """Write config.yaml to the folder of a run: its recipe with every default written out, as it runs again.

    Nothing is written for data made in Python, which no file can name.

    Args:
        rate: the learning rate, where the catalogue has chosen it.
        options: the method's, see `methods.option_values`.
    """
    if task.work is None:
        return
    recipe = Recipe.resolved(
        spec,
        task.work,
        learning_rate=rate,
        eval_every=spec.evaluation_interval,
        task=task.task,
        metric=task.metric,
        max_length=task.work.length,
        options=options,
    )
    title = (
        "What this run was, every default written out. It runs again as it is:\n\n"
        f"  loratlas train {Path(spec.output_dir) / CONFIG}"
    )
    write_text(Path(spec.output_dir) / CONFIG, to_yaml(recipe, title))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
