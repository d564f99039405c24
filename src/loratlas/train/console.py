"""Progress bars and the leaderboard in the terminal."""

from __future__ import annotations

import copy
import textwrap
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from loratlas.train.facts import Facts
from loratlas.train.progress import Progress
from loratlas.train.results import Comparison, RunResult
from loratlas.train.wording import headings, noise_line, ranked, row_cells, verdict_line

_FULL_BARS = 8  # kept on the screen
_HEADING = 12  # characters of a column's title in a line


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

    def described(self, description: str) -> None:
        self._console.print(description, markup=False)

    def prepared(self, known: Facts) -> None:
        for sentence in known.sentences():
            self._console.print(sentence, markup=False)

    def one_run(self) -> ConsoleProgress:
        """Shares the bars, but has a bar and a name of its own."""
        return copy.copy(self)

    def started(self, label: str, steps: int) -> None:
        self._hide_old()
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

    def _hide_old(self) -> None:
        """Keep only the newest of the bars that are full, so that a long comparison does not fill the screen."""
        full = [task.id for task in self._bars.tasks if task.finished and task.visible]
        for old in full[:-_FULL_BARS]:
            self._bars.update(old, visible=False)

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step")


def leaderboard(comparison: Comparison) -> Group:
    """The comparison as a table, best first; the verdict and the notes below."""
    value = comparison.to_dict()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(headings(value)):
        # wrapped here, because Rich would rather break the numbers
        head = "\n".join(textwrap.wrap(title, _HEADING))
        table.add_column(escape(head), justify="left" if index == 0 else "right")
    for row in ranked(value):
        best = row["method"] == value["verdict"]["winner"]
        table.add_row(*map(escape, row_cells(value, row)), style="bold" if best else None)
    below = [Text(verdict_line(value), style="bold"), *(Text(note, style="dim") for note in _notes(value))]
    return Group(Text(comparison.task, style="italic"), table, *filter(None, below))


def _notes(value: dict[str, Any]) -> list[str]:
    return [noise_line(value), *value["notes"]]
