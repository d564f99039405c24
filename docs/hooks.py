"""What the site takes from the code when it is built, so that it cannot go stale.

A comment on a line of its own is replaced:

    <!-- catalogue -->                      every system of the catalogue
    <!-- baselines -->                      what they are compared with
    <!-- options: module:Class -->          the fields of a configuration, with defaults and help
    <!-- command: name -->                  the arguments and options of a `loratlas` command
    <!-- results: name -->                  what benchmarks/results/name.json holds

A method's page ends with what the comparisons of benchmarks/results/glue.json say of it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from markdown_table import table
from results import measured_here, results

from loratlas.catalog import System, baselines, systems
from loratlas.engine.config import AtlasConfig

log = logging.getLogger("mkdocs.hooks.loratlas")  # a warning ends `mkdocs build --strict`

METHODS = Path(__file__).parent / "methods"
MARKER = re.compile(r"^<!-- (?P<what>[a-z]+)(?:: (?P<of>\S+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page: replace its markers."""

    def replace(match: re.Match[str]) -> str:
        make = GENERATORS.get(match["what"])
        if make is None:
            log.warning("%s: there is nothing to put in the place of %s", page.file.src_uri, match[0])
            return match[0]
        return make(*filter(None, [match["of"]]))

    made = MARKER.sub(replace, markdown)
    place = Path(page.file.src_uri)
    return made + measured_here(place.stem) if place.parent.name == METHODS.name else made


def catalogue() -> str:
    every = systems()
    done = sum(system.status == "implemented" for system in every)
    return f"{len(every)} systems, {done} of them implemented (✓).\n\n{_systems(every)}"


def known_baselines() -> str:
    return _systems(baselines())


def options(target: str) -> str:
    """Two tables: the fields of the class and of what it shares with a few others, and those of every adapter."""
    module, _, name = target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    inherited = {field for base in cls.__mro__[1:] if _ours(base) for field in _declared(base)}
    foreign = {field for base in cls.__mro__ if not _ours(base) for field in _declared(base)}
    fields = [field for field in dataclasses.fields(cls) if field.name not in foreign - inherited]
    for field in fields:
        if "help" not in field.metadata and field.name in {*_declared(cls), *inherited}:
            log.warning("%s: the field %s has no help text", target, field.name)
    special = {field for base in cls.__mro__ if _ours(base) and base is not AtlasConfig for field in _declared(base)}
    own = [field for field in fields if field.name in special]
    shared = [field for field in fields if field.name not in special]
    parts = [_fields(own)]
    if shared:
        parts.append(f"Shared by all adapters:\n\n{_fields(shared)}")
    return "\n\n".join(parts)


def command(name: str) -> str:
    """The parameters of a command, in the groups of its --help."""
    import typer.main

    from loratlas.cli import app

    # typer's classes, seen through the attributes that its help reads
    parameters: list[Any] = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    groups: dict[str, list[Any]] = {}
    for parameter in parameters:
        if parameter.name == "help":
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        positional = parameter.param_type_name == "argument"
        groups.setdefault("Arguments" if positional else panel or "General", []).append(parameter)
    order = ["Arguments", *sorted(set(groups) - {"Arguments", "General"}, key=list(groups).index), "General"]
    return "\n\n".join(f"**{group}**\n\n{_parameters(groups[group])}" for group in order if group in groups)


GENERATORS: dict[str, Callable[..., str]] = {
    "catalogue": catalogue,
    "baselines": known_baselines,
    "options": options,
    "command": command,
    "results": results,
}


def _systems(found: Iterable[System]) -> str:
    """The implemented ones first; a check mark says which."""
    rows = sorted(found, key=lambda system: system.status != "implemented")
    return table(
        ("", "system", "what it does", "kind", "paper", "code", "ships as"),
        [
            (
                "✓" if system.status == "implemented" else "",
                f"{_name(system)}<br>`{system.slug}`",
                system.summary,
                system.kind,
                f"[{system.paper}](https://arxiv.org/abs/{system.paper})",
                f"[official](https://github.com/{system.official})" if system.official else "–",
                ", ".join(system.exports),
            )
            for system in rows
        ],
    )


def _name(system: System) -> str:
    """The name, linked to the method's page; an implemented method of ours must have one."""
    if (METHODS / f"{system.slug}.md").is_file():
        return f"[{system.name}]({system.slug}.md)"
    if system.entry.startswith("loratlas."):
        log.warning("%s is implemented and has no page docs/methods/%s.md", system.slug, system.slug)
    return system.name


def _ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "loratlas"


def _declared(cls: type) -> list[str]:
    return list(inspect.get_annotations(cls))


def _fields(fields: Iterable[dataclasses.Field[Any]]) -> str:
    rows = [(f"`{f.name}`", f"`{f.type}`", f"`{_default(f)}`", f.metadata.get("help", "")) for f in fields]
    return table(("option", "type", "default", "meaning"), rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _parameters(parameters: Iterable[Any]) -> str:
    rows = []
    for parameter in parameters:
        positional = parameter.param_type_name == "argument"
        name = parameter.name.upper() if positional else ", ".join(parameter.opts)
        plain = parameter.default is None or parameter.default is False or callable(parameter.default)
        default = "required" if parameter.required else "–" if plain else f"`{_plain(parameter.default)}`"
        rows.append((f"`{name}`", default, parameter.help or ""))
    return table(("name", "default", "meaning"), rows)


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))  # an Enum's value is what one types
