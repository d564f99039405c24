"""The learning-rate search: one small grid for every method, on rows held out of the training rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratlas.errors import UserError
from loratlas.train.data import TaskData
from loratlas.train.results import RunResult

GRID = (1e-3, 2e-3, 4e-3, 8e-3)
WIDEN = 2
_SHARE, _MOST = 0.1, 1000  # of the training rows
_SEED = 2000  # away from the seeds of the final runs and of their re-runs


@dataclass(frozen=True)
class Choice:
    """The rate that a method runs with, and what a reader should know about it."""

    rate: float
    note: str | None = None


def check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """The grid in rising order.

    Raises:
        UserError: a rate that is not positive or is named twice.
    """
    for rate in grid:
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"the grid of learning rates holds {rate:g}, which is not a positive number.")
    if len(set(grid)) < len(grid):
        raise UserError(f"the grid of learning rates names one twice: {', '.join(f'{rate:g}' for rate in grid)}.")
    return tuple(sorted(grid))


def search_seed(seeds: Sequence[int]) -> int:
    """A seed that no final run has."""
    return max(seeds) + _SEED


def hold_out(task: TaskData, seed: int = 0) -> TaskData:
    """`task` with a tenth of its training rows, 1,000 at most, in the place of the test rows."""
    rows = min(_MOST, max(1, round(_SHARE * len(task.train))))
    halves = task.train.train_test_split(test_size=rows, seed=seed)
    description = f"{task.description}; measured on {rows:,} of the training rows, held out"
    return replace(task, train=halves["train"], test=halves["test"], description=description)


def choose(label: str, tried: Sequence[float], runs: Sequence[RunResult]) -> Choice:
    """The rate with the best final metric; the smaller one of equals. Diverged and missing runs lose.

    Args:
        runs: those of the rates `tried` that came to an end.
    """
    tried, best = sorted(tried), _best(runs)
    if not best:
        return Choice(tried[0], f"{label}: no learning rate of the search came to an end; the smallest is taken.")
    if _outermost(tried, best):
        edge = "smallest" if best[0] == tried[0] else "largest"
        return Choice(best[0], f"{label}: its best learning rate, {best[0]:g}, is the {edge} that was tried.")
    return Choice(best[0])


def beyond(tried: Sequence[float], runs: Sequence[RunResult]) -> float | None:
    """The rate to try next where the best of `tried` is the outermost: as many times it as it is its neighbour.

    None if the best lies between others, if several are equal, or if only one was tried. Arguments as of `choose`.
    """
    tried, best = sorted(tried), _best(runs)
    if not _outermost(tried, best):
        return None
    neighbour = tried[1] if best[0] == tried[0] else tried[-2]
    return float(f"{best[0] * best[0] / neighbour:.3g}")


def _outermost(tried: Sequence[float], best: Sequence[float]) -> bool:
    return len(tried) > 1 and len(best) == 1 and best[0] in (tried[0], tried[-1])


def _best(runs: Sequence[RunResult]) -> list[float]:
    """The rates of the best runs, rising."""
    found = [run for run in runs if run.diverged_at is None and math.isfinite(run.final)]
    if not found:
        return []
    top = (max if found[0].greater_is_better else min)(run.final for run in found)
    return sorted(run.learning_rate for run in found if run.final == top)
