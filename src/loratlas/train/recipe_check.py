"""All that is wrong with the values of a recipe, told at once and before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

from loratlas.catalog import find, load_entry
from loratlas.errors import UserError
from loratlas.train.recipe import DEMO, OPTION_MAPS, PARTS, Recipe
from loratlas.train.tasks import METRICS
from loratlas.train.typed import fits, in_words

_LISTS = ("text_columns", "report_to")  # a single text counts as a list of one
_MISSING = {
    "method": "give a slug of `loratlas methods`",
    "model": f"give a hub id or a folder, or {DEMO}",
    "data": f"give a file, a folder or a dataset of the hub, or {DEMO}",
}


class Problem(NamedTuple):
    """What is wrong with the value of `name`: a field of `Recipe`, or "options.NAME" and the like."""

    name: str
    text: str


def make(values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values, after `check`, and with every member of the run in its own field.

    Raises:
        UserError: everything that is wrong.
    """
    from loratlas.train.roles import spelled_out

    raise_any([problem.text for problem in check(values)])
    return Recipe(**{name: _converted(name, value) for name, value in spelled_out(values).items()})


def placed(values: Mapping[str, Any], own: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options of members as fields of a recipe: {"optimizer_options": {...}} for own={"lora-pro": {...}}.

    values: of the recipe, to see who takes part.

    Raises:
        UserError: options for a slug that does not.
    """
    found: dict[str, dict[str, Any]] = {}
    for slug, options in own.items():
        named = members(values)
        alone = not any(find(each).kind == "adapter" for each in named)  # it may run on plain LoRA
        if slug not in named and not (alone and slug == "lora"):
            raise UserError(f"--set {slug}.{next(iter(options))}: {slug} is not among the methods {', '.join(named)}.")
        kind = find(slug).kind
        found[OPTION_MAPS[kind if kind in PARTS else "method"]] = options
    return found


def merged(values: Mapping[str, Any], maps: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`values` with the options in `maps` over its own; what is no mapping stays for `check` to find."""
    ours = {name: values.get(name) for name in maps}
    return {
        **values,
        **{name: {**(old or {}), **maps[name]} for name, old in ours.items() if isinstance(old, dict | None)},
    }


def members(values: Mapping[str, Any]) -> list[str]:
    """All slugs that a recipe names, as far as they are known to the catalogue."""
    fields = [values.get(field) for field in OPTION_MAPS]
    slugs = [slug for text in fields if isinstance(text, str) for slug in text.split("+")]
    return [slug for slug in slugs if not _unknown(slug)]


def raise_any(lines: list[str]) -> None:
    """One `UserError` for one or several mistakes; nothing for none."""
    if len(lines) == 1:
        raise UserError(lines[0])
    if lines:
        raise UserError(f"{len(lines)} mistakes:\n" + "\n".join(f"  {line}" for line in lines))


def check(values: Mapping[str, Any]) -> list[Problem]:
    """All that is wrong with the values of a recipe; empty if it can run, as far as is known without model and data."""
    problems = list(_fields(values))
    wrong = {problem.name for problem in problems}
    right = {name: value for name, value in values.items() if name not in wrong}
    problems += _conflicts(right)
    if "method" not in right:
        return problems
    named = list(_slugs(right))
    options = any(right.get(name) for name in OPTION_MAPS.values())
    if not named and (options or not problems):  # else torch need not be loaded to tell what is wrong
        named = _cast(right)
    return problems + named


def _fields(values: Mapping[str, Any]) -> Iterator[Problem]:
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    hints = get_type_hints(Recipe)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}."
            yield Problem(name, f"there is no field {name!r}: {hint}")
        elif not fits(_listed(name, value), hints[name]):
            yield Problem(name, f"{name} must be {_wanted(known[name], hints[name])}, but it is {value!r}.")
        elif value is not None and not _in_range(value, known[name].metadata):
            yield Problem(name, _out_of_range(known[name], value))
    for name, advice in _MISSING.items():
        if name not in values:
            yield Problem(name, f"{name} is missing: {advice}.")


def _listed(name: str, value: Any) -> Any:
    return [value] if isinstance(value, str) and name in _LISTS else value


def _converted(name: str, value: Any) -> Any:
    hint = get_type_hints(Recipe)[name]
    if name in _LISTS:
        return tuple(_listed(name, value))
    return float(value) if isinstance(value, int) and fits(1.5, hint) else value


def _in_range(value: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return (
        ("least" not in limits or value >= limits["least"])
        and ("above" not in limits or value > limits["above"])
        and ("most" not in limits or value <= limits["most"])
        and ("choices" not in limits or value in limits["choices"])
    )


def _wanted(f: Any, hint: Any) -> str:
    choices = f.metadata.get("choices")
    return f"one of {', '.join(choices)}" if choices else in_words(hint)


def _out_of_range(f: Any, value: Any) -> str:
    limits = f.metadata
    if "choices" in limits:
        near = difflib.get_close_matches(str(value), limits["choices"], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(limits['choices'])}."
        return f"{f.name} has no value {value!r}: {hint}"
    parts = []
    for key, words in (("least", "at least"), ("above", "above"), ("most", "at most")):
        parts += [f"{words} {limits[key]:g}"] if key in limits else []
    return f"{f.name} must be {' and '.join(parts) or 'finite'}, but it is {value!r}."


def _conflicts(values: Mapping[str, Any]) -> Iterator[Problem]:
    def given(name: str) -> Any:
        return values.get(name) or None

    task, metric, texts = given("task"), given("metric"), _listed("text_columns", given("text_columns") or ())
    if given("data") == DEMO:
        for name in ("test", "forget", "text_columns", "label_column"):
            if given(name):
                yield Problem(name, f"{name} is for data of your own, but data is {DEMO}: leave it out.")
        if task not in (None, "text-classification"):
            yield Problem("task", f"task is {task}, but the texts of {DEMO} are for text-classification: leave it out.")
    if task in METRICS and metric is not None and metric not in METRICS[task]:
        yield Problem("metric", f"metric is {metric}, which {task} does not have: choose {', '.join(METRICS[task])}.")
    if len(texts) > 2:
        yield Problem("text_columns", f"text_columns names {len(texts)} columns; one text or a pair can be read.")
    if given("label_column") in texts:
        yield Problem("label_column", f"label_column {values['label_column']!r} is one of text_columns as well.")
    if task == "causal-lm" and given("label_column"):
        yield Problem(
            "label_column", "label_column has no use for causal-lm, which learns from the text: leave it out."
        )


def _slugs(values: Mapping[str, Any]) -> Iterator[Problem]:
    for field in OPTION_MAPS:
        for slug in (values.get(field) or "").split("+") if values.get(field) else ():
            text = _unknown(slug)
            if text:
                yield Problem(field, text)


def _unknown(slug: str) -> str | None:
    """What is wrong with the name itself."""
    try:
        system = find(slug)
        if not system.entry:
            load_entry(system)  # says that it is planned
    except UserError as error:
        return str(error)
    return None


def _cast(values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with options, and with members that do not go together."""
    from loratlas.train.roles import cast, spelled_out

    try:
        spelled = spelled_out(values)
    except UserError as error:
        return [Problem(error.field or "method", str(error))]
    found = cast(SimpleNamespace(**spelled))
    said = list(found.problems())
    # what is lacking is no mistake of a template yet, which is filled in by the command line: `train` looks for that
    return [Problem(name, text) for name, text in said or found.idle(values)]
