"""The leaderboard in words: the same columns and numbers for the terminal and for report.html.

A row is a dictionary with method (slug), label, values (the final metric of each seed), trainable_parameters,
steps_to_baseline (first evaluated step at which the baseline's final metric is reached, None if never),
relative_step_time (1.0 is LoRA's, None if LoRA did not run) and peak_memory_bytes (None if it was not measured).
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

Row = dict[str, Any]


def headings(comparison: dict[str, Any]) -> list[str]:
    """Titles of the columns that `row_cells` fills."""
    return [
        "method",
        str(comparison["metric"]),
        "trainable parameters",
        f"steps to the final {comparison['metric']} of {comparison['baseline']}",
        "step time (LoRA = 1)",
        "peak memory",
    ]


def row_cells(row: Row) -> list[str]:
    """The cells of one method; a dash stands for what does not exist."""
    steps, time, memory = row["steps_to_baseline"], row["relative_step_time"], row["peak_memory_bytes"]
    return [
        str(row["label"]),
        _metric(row["values"]),
        f"{row['trainable_parameters']:,}",
        "not reached" if steps is None else f"{steps:,}",
        "-" if time is None else f"{time:.2f}",
        "-" if memory is None else _size(memory),
    ]


def ranked(comparison: dict[str, Any]) -> list[Row]:
    """The rows, best mean metric first, those without a finite one last; ties keep the order of the comparison."""
    sign = -1.0 if comparison["greater_is_better"] else 1.0

    def place(row: Row) -> tuple[bool, float]:
        lost = any(value is None for value in row["values"])
        return lost, 0.0 if lost else sign * fmean(row["values"])

    return sorted(comparison["rows"], key=place)


def _metric(values: list[float | None]) -> str:
    """The mean, and with several seeds the distance from it to the farthest seed."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "not finite"
    mean = fmean(numbers)
    if len(numbers) == 1:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {max(abs(value - mean) for value in numbers):.4f}"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
