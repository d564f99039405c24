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
from loratlas.train.recipe import OPTION_MAPS, Recipe
from loratlas.train.recipe_check import Problem, check, make, merged, placed, raise_any
from loratlas.train.yaml_text import dump_value, parse

if TYPE_CHECKING:
    from loratlas.train.data import TaskData
    from loratlas.train.spec import RunSpec

SUFFIXES = (".yaml", ".yml")
CONFIG = "config.yaml"
_YAML = {"None": None, "True": True, "False": False}
_WIDTH, _COMMENT = 110, 32  # columns of a line, and where comments begin


def read_recipe(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    own: Mapping[str, dict[str, Any]] | None = None,
) -> Recipe:
    """The recipe in `path`.

    Args:
        overrides: values that come before those of the file; "options" are added to the file's, one by one.
        own: {slug: options for it}, which come before all others.

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
    ours = merged(overrides or {}, placed({**document.values, **(overrides or {})}, own or {}))
    maps = {name: ours[name] for name in OPTION_MAPS.values() if name in ours}
    values = {**merged(document.values, maps), **{name: value for name, value in ours.items() if name not in maps}}
    values |= {name: {} for name in OPTION_MAPS.values() if name in values and values[name] is None}
    typed = {*ours, *(f"{name}.{key}" for name, options in maps.items() for key in options)}

    def place(name: str) -> str:
        if name in typed:
            return "command line: "
        return f"{file}, line {document.lines[name]}: " if name in document.lines else f"{file}: "

    twice = [Problem(name, f"{name} is given twice.") for name in document.twice]
    found = sorted([*twice, *check(values)], key=lambda problem: document.lines.get(problem.name, math.inf))
    raise_any([f"{place(problem.name)}{problem.text}" for problem in found])
    return make(values)


def to_yaml(recipe: Recipe, title: str) -> str:
    """The recipe with a comment on every field; options that are None by default stand there as comments.

    title: lines for the top, without their "# ".
    """
    lines = [f"# {line}".rstrip() for line in title.splitlines()]
    section = ""
    for field in dataclasses.fields(recipe):
        if field.metadata["section"] != section:
            section = field.metadata["section"]
            lines += ["", f"# {section}"] if section not in ("Method", "Options") else [""]
        if field.name not in OPTION_MAPS.values():
            lines += _entry("", field.name, getattr(recipe, field.name), field.metadata["help"])
    for role, options in OPTION_MAPS.items():
        if getattr(recipe, role) is not None:
            lines += [*([""] if role != "method" else []), *_options(getattr(recipe, role), options, recipe)]
    return "\n".join([*lines, ""])


def _options(slug: str, title: str, recipe: Recipe) -> Iterator[str]:
    from loratlas.train.methods import option_fields

    system, options = find(slug), getattr(recipe, title)
    helps = {field.name: field.metadata.get("help", "") for field in option_fields(system)}
    unset = [field.name for field in option_fields(system) if field.default is None]
    yield f"# Options of {system.name}"
    yield f"{title}:" if options else f"{title}: {{}}"
    for name in dict.fromkeys([*helps, *options]):
        if name in options:
            yield from _entry("  ", name, options[name], helps.get(name, ""))
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


def write_config(spec: RunSpec, task: TaskData, rate: float, options: dict[str, dict[str, Any]]) -> None:
    """Write config.yaml to the folder of a run: its recipe with every default written out, as it runs again.

    Nothing is written for data made in Python, which no file can name.

    Args:
        rate: the learning rate, where the catalogue has chosen it.
        options: by mapping, see `methods.option_values`.
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
        **options,
    )
    title = (
        "What this run was, every default written out. It runs again as it is:\n\n"
        f"  loratlas train {Path(spec.output_dir) / CONFIG}"
    )
    write_text(Path(spec.output_dir) / CONFIG, to_yaml(recipe, title))
