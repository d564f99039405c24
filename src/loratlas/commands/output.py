"""What goes where: results to standard output, everything else (progress, logs, errors) to standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import typer
from rich.console import Console

_PIPED_WIDTH = 120  # Rich falls back to 80 columns when the output is not a terminal, and would cut tables


def console() -> Console:
    """Standard output."""
    return _console(stderr=False)


def error_console() -> Console:
    """Standard error."""
    return _console(stderr=True)


def print_json(value: Any) -> None:
    """Print dataclasses, lists and dictionaries as indented JSON; NaN and infinities become null."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _console(*, stderr: bool) -> Console:
    result = Console(stderr=stderr, highlight=False)
    if result.is_terminal or "COLUMNS" in os.environ:
        return result
    return Console(stderr=stderr, highlight=False, width=_PIPED_WIDTH)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
