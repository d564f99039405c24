"""The leaderboard in words: the same columns, numbers and verdict for the terminal and for report.html.

A row is one of `results.Comparison.rows`, a comparison what its `to_dict` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

Row = dict[str, Any]


def headings(comparison: dict[str, Any]) -> list[str]:
    """Titles of the columns that `row_cells` fills; those that no row has anything for are left out."""
    return [title for title, _ in _columns(comparison)]


def row_cells(comparison: dict[str, Any], row: Row) -> list[str]:
    """The cells of one method; a dash stands for what does not exist."""
    cells = {
        "method": str(row["label"]),
        "metric": _metric(row),
        "difference": "-" if row["difference"] is None else signed(row["difference"]),
        "rate": f"{row['learning_rate']:g}",
        "parameters": _parameters(row),
        "steps": "not reached" if row["steps_to_baseline"] is None else f"{row['steps_to_baseline']:,}",
        "time": "-" if row["relative_step_time"] is None else f"{row['relative_step_time']:.2f}",
        "memory": "-" if row["peak_memory_bytes"] is None else _size(row["peak_memory_bytes"]),
        "forgetting": _forgetting(row),
    }
    return [cells[key] for _, key in _columns(comparison)]


def ranked(comparison: dict[str, Any]) -> list[Row]:
    """The rows, best mean metric first, those without a finite one last; ties keep the order of the comparison."""
    sign = -1.0 if comparison["greater_is_better"] else 1.0

    def place(row: Row) -> tuple[bool, float]:
        lost = any(value is None for value in row["values"])
        return lost, 0.0 if lost else sign * fmean(row["values"])

    return sorted(comparison["rows"], key=place)


def signed(found: dict[str, Any]) -> str:
    """An interval as +0.0123 ± 0.0045, without the last part for one seed."""
    half = "" if found["half"] is None else f" ± {found['half']:.4f}"
    return f"{found['mean']:+.4f}{half}"


def verdict_line(comparison: dict[str, Any]) -> str:
    """Who won and why, or that nobody did and why not; empty for a single method."""
    found, rows = comparison["verdict"], {row["method"]: row for row in comparison["rows"]}
    if found["why"] == "one method":
        return ""

    def label(slug: str) -> str:
        return str(rows[slug]["label"]) if slug in rows else slug

    def gain(slug: str) -> str:
        return f"{label(slug)} ({signed(rows[slug]['difference'])})"

    base = label(comparison["baseline"])
    reasons = {
        "winner": lambda: f"Winner: {gain(found['leader'])} beats {base}{_runner_up(comparison, label)}.",
        "one seed": lambda: "No winner: one seed gives no interval. Three seeds or more do.",
        "incomplete": lambda: f"No winner: no run of the baseline {base} came to an end.",
        "no difference": lambda: f"No winner: no method is better than {base} beyond what other seeds explain.",
        "noise": lambda: (
            f"No winner: the gain of {gain(found['leader'])} over {base} is not above the noise floor of "
            f"{comparison['noise']['level']:.4f}."
        ),
        "tie": lambda: (
            f"No winner: {gain(found['leader'])} beats {base}, but is not told apart from "
            f"{label(found['runner_up'])} ({signed(found['lead']) if found['lead'] else 'no common seed'})."
        ),
    }
    worse = f" Worse than {base}: {', '.join(gain(slug) for slug in found['worse'])}." if found["worse"] else ""
    return f"{reasons[found['why']]()}{_unknown_floor(comparison)}{worse}"


def noise_line(comparison: dict[str, Any]) -> str:
    """The noise floor in words; empty where it was not measured."""
    noise = comparison["noise"]
    if noise is None:
        return ""
    return (
        f"Noise floor {noise['level']:.4f}: so far apart are runs of {comparison['baseline']} that differ in seed "
        f"alone (root mean square over {noise['difference']['n']} re-runs, under other seeds because one would repeat "
        f"itself; mean {signed(noise['difference'])})."
    )


def _columns(comparison: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """(title, key) of each column."""
    metric, baseline, rows = comparison["metric"], comparison["baseline"], comparison["rows"]
    columns = [
        ("method", "method", True),
        (str(metric), "metric", True),
        (f"difference to {baseline}", "difference", any(row["difference"] for row in rows)),
        ("learning rate", "rate", bool(comparison["rates"])),
        (f"trainable parameters{' (used / room)' if any(map(_moves, rows)) else ''}", "parameters", True),
        (f"steps to the final {metric} of {baseline}", "steps", True),
        ("step time (LoRA = 1)", "time", True),
        ("peak memory", "memory", True),
        (f"forgetting ({_old_metric(rows)})", "forgetting", any(row["forgetting"] for row in rows)),
    ]
    return [(title, key) for title, key, shown in columns if shown]


def _metric(row: Row) -> str:
    if any(value is None for value in row["values"]):
        return "not finite"
    half = row["interval"]["half"]
    return f"{row['interval']['mean']:.4f}" + ("" if half is None else f" ± {half:.4f}")


def _moves(row: Row) -> bool:
    """Whether the method's ranks move; rows of earlier versions do not say."""
    return row.get("used_parameters") is not None


def _parameters(row: Row) -> str:
    room = f"{row['trainable_parameters']:,}"
    return f"{row['used_parameters']:,} / {room}" if _moves(row) else room


def _forgetting(row: Row) -> str:
    found = row["forgetting"]
    return "-" if found is None else f"{found['before']:.4f} to {found['after']:.4f} ({signed(found['change'])})"


def _old_metric(rows: Sequence[Row]) -> str:
    return next((str(row["forgetting"]["metric"]) for row in rows if row["forgetting"]), "")


def _runner_up(comparison: dict[str, Any], label: Any) -> str:
    found = comparison["verdict"]
    if found["runner_up"] is None:
        return ""
    return f" and {label(found['runner_up'])}, the next best ({signed(found['lead'])})"


def _unknown_floor(comparison: dict[str, Any]) -> str:
    telling = comparison["verdict"]["why"] not in ("one seed", "incomplete")
    return (
        " The noise floor is unknown: the baseline was not run again."
        if telling and comparison["noise"] is None
        else ""
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
