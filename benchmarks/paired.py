"""Paired measurements: what the benchmarks share.

All arms run once a round, one after the other, so that a slow moment of the machine hits them all; reported are ratios
within a round, as the median over the rounds with the quartiles.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from loratlas.files import write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """above / below within each round."""
    return Spread.of(a / b for a, b in zip(above, below, strict=True))


@dataclass(frozen=True)
class Bar:
    """A claim with its limit; `at_least` says on which side of it the measured value has to lie."""

    claim: str
    limit: float
    value: Spread
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value.median >= self.limit if self.at_least else self.value.median <= self.limit

    def row(self) -> tuple[str, ...]:
        sign = "≥" if self.at_least else "≤"
        return self.claim, f"{sign} {self.limit:g}", str(self.value), "pass" if self.met else "miss"


@dataclass(frozen=True)
class Table:
    """Rows as a reader sees them, on the terminal and on the site."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left")
        for index, name in enumerate(self.head):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def bars_table(bars: Sequence[Bar]) -> Table:
    return Table("Bars", ("claim", "bar", "measured, median (quartiles)", ""), [bar.row() for bar in bars])


def shuffled(arms: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """The order of the arms in each round, at random, so that none always comes after the same other one."""
    generator = random.Random(seed)
    for _ in range(rounds):
        yield generator.sample(arms, len(arms))


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def save(path: Path, settings: dict[str, Any], data: Any, bars: Sequence[Bar], tables: Sequence[Table]) -> None:
    """Write everything needed to read and to repeat the measurement."""
    write_json(
        path,
        {
            "command": command(),
            **provenance(),
            "settings": {**settings, "threads": torch.get_num_threads()},
            "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
            "tables": [asdict(table) for table in [bars_table(bars), *tables]],
            "data": data,
        },
    )


def command() -> str:
    """The command that is running, without the places of this machine."""
    kept, words = ["python"], iter(sys.argv)
    for word in words:
        if word in ("--out", "--results"):
            next(words)
        else:
            kept += [word, f"DIR/{Path(next(words)).name}"] if word == "--data" else [word]
    return shlex.join(kept)


def provenance() -> dict[str, Any]:
    """When, where and with which versions something was measured."""
    packages = ("torch", "transformers", "peft", "loratlas")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
