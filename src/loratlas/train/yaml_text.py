"""YAML as people write it: 1e-3 is a number, a key given twice is a mistake, and every key knows its line."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import yaml

# YAML 1.1, which PyYAML reads, wants a dot and a sign in 1.0e-3; all that write learning rates leave them out
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent(dumper: _Dumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if len(text.splitlines()) > 1 else None)


_Dumper.add_representer(str, _represent)  # texts of several lines stay on one line of the file
for _each in (_Loader, _Dumper):  # the dumper must quote what the loader would take for a number
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class Document(NamedTuple):
    """values: the mapping. lines: line (from 1) of each key, "options.r" for key r of the mapping options. twice: keys
    that were given more than once."""

    values: dict[str, Any]
    lines: dict[str, int]
    twice: list[str]


def parse_value(text: str) -> Any:
    """One value.

    Raises:
        ValueError: not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_reason(error)) from None


def parse(text: str) -> Document:
    """A mapping of names to values, with the lines of its keys and of those one level below.

    Raises:
        ValueError: not YAML (with line and column), or no mapping of names.
    """
    try:
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_reason(error)) from None
    if node is None or not isinstance(values, dict):
        raise ValueError("it must be lines of NAME: VALUE")
    lines: dict[str, int] = {}
    twice: list[str] = []
    _collect(node, "", lines, twice)
    return Document({str(name): value for name, value in values.items()}, lines, twice)


def dump_value(value: Any) -> str:
    """`value` on one line, so that `parse_value` gives back exactly it; tuples and sets become lists.

    value: None, bool, int, float, str, or lists, tuples, sets and dictionaries of these.
    """
    text = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")


def _plain(value: Any) -> Any:
    """Subclasses (of numbers as of NumPy, of text as in enumerations) as what they are; tuples and sets as lists."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, str):
        return "".join(value)  # str() of an enumeration is its name
    return next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), value)


def _collect(node: Any, prefix: str, lines: dict[str, int], twice: list[str]) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            twice.append(name)
        lines[name] = key.start_mark.line + 1
        if not prefix and isinstance(value, yaml.MappingNode):
            _collect(value, f"{name}.", lines, twice)


def _reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'not YAML'}"
