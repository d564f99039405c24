"""Progress bars and the leaderboard in the terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from loratlas.train.facts import Facts
from loratlas.train.progress import Progress
from loratlas.train.results import Comparison, RunResult
from loratlas.train.wording import headings, ranked, row_cells


class ConsoleProgress(Progress):
    """One bar a run: steps, loss, headline metric, steps a second, remaining time. Use it as a context manager.

    Where the output is no terminal there are no bars, but a line for every evaluation.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[metric]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None
        self._label = ""

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def prepared(self, known: Facts) -> None:
        for sentence in known.sentences():
            self._console.print(sentence, markup=False)

    def started(self, label: str, steps: int) -> None:
        self._label = label
        self._task = self._bars.add_task(escape(label), total=steps, loss="-", metric="")
        self._line(f"{label}: {steps} steps")

    def step(self, step: int, loss: float) -> None:
        self._bars.update(self._task, completed=step, loss=f"{loss:.3f}")

    def evaluated(self, step: int, metric: str, value: float) -> None:
        self._bars.update(self._task, metric=f"{metric} {value:.4f}")
        self._line(f"{self._label}: step {step}, {metric} {value:.4f}")

    def finished(self, result: RunResult) -> None:
        if result.diverged_at is not None:
            self._console.print(
                f"[yellow]{escape(result.label)} diverged at step {result.diverged_at}[/]; the adapter of the step "
                "before is kept."
            )

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step")


def leaderboard(comparison: Comparison) -> Table:
    """The comparison as a table, best first, its notes below."""
    value = comparison.to_dict()
    table = Table(title=escape(comparison.task), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = escape("\n".join(comparison.notes))
    table.caption_justify = "left"
    for index, title in enumerate(headings(value)):
        table.add_column(escape(title), justify="left" if index == 0 else "right")
    for place, row in enumerate(ranked(value)):
        table.add_row(*map(escape, row_cells(row)), style="bold" if place == 0 and len(comparison.rows()) > 1 else None)
    return table
