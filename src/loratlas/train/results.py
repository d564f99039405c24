"""What runs and comparisons leave behind: plain data, written as JSON."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from statistics import fmean
from typing import Any


@dataclass
class RunResult:
    """One run.

    Attributes:
        method, label: slug and name of the method.
        final: headline metric after the last step (of the last good state if the run diverged).
        history: [{"step", "loss", "grad_norm", "learning_rate"}] of every step.
        evals: [{"step", "eval_loss", <every metric>}].
        step_seconds: median time of an optimizer step, without evaluations.
        seconds: time of the whole training, with evaluations.
        setup_seconds: time of making the adapter, with the calibration pass of methods that need one.
        peak_memory_bytes: of set-up and training, see `memory`; None where it is not known.
        events: recompositions of the adapter (see `analysis.recomposition`), empty for most methods.
        diverged_at: step whose loss or gradient was not finite, None if all went well.
        adapter_dir: the trained adapter, as PEFT saves it.
        adapted_modules, scaling, export_rank: see `facts.Facts`.
        labels: names of the classes, None for tasks without.
    """

    method: str
    label: str
    task: str
    model: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    options: dict[str, Any]
    metric: str
    greater_is_better: bool
    final: float
    history: list[dict[str, float]]
    evals: list[dict[str, float]]
    trainable_parameters: int
    total_parameters: int
    step_seconds: float
    seconds: float
    peak_memory_bytes: int | None
    adapter_dir: str
    setup_seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    diverged_at: int | None = None
    adapted_modules: int = 0
    scaling: tuple[float, float] | None = None
    export_rank: int | None = None
    labels: list[str] | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        """As JSON; a number that is not finite, as a diverged run may have, becomes null."""
        return _finite(asdict(self))


@dataclass
class Comparison:
    """Several runs on the same work.

    Attributes:
        task: one line about the data. baseline: slug of the method that the others are measured against.
        notes: sentences that belong under the leaderboard.
    """

    task: str
    metric: str
    greater_is_better: bool
    baseline: str
    runs: list[RunResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """The leaderboard: one row a method, means over seeds, in the order of the runs (columns: `wording`)."""
        groups: dict[str, list[RunResult]] = {}
        for run in self.runs:
            groups.setdefault(run.method, []).append(run)
        lora = groups.get("lora") or groups.get("peft-lora")
        unit = fmean(run.step_seconds for run in lora) if lora else None
        goal = fmean(run.final for run in groups[self.baseline]) if self.baseline in groups else None
        return [self._row(runs, unit, goal) for runs in groups.values()]

    def _row(self, runs: list[RunResult], unit: float | None, goal: float | None) -> dict[str, Any]:
        peaks = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
        return {
            "method": runs[0].method,
            "label": runs[0].label,
            "values": [run.final for run in runs],
            "trainable_parameters": runs[0].trainable_parameters,
            "steps_to_baseline": None if goal is None else self._steps_to(goal, runs),
            "relative_step_time": None if unit is None else fmean(run.step_seconds for run in runs) / unit,
            "peak_memory_bytes": max(peaks) if peaks else None,
        }

    def _steps_to(self, goal: float, runs: list[RunResult]) -> int | None:
        """First evaluated step at which the mean over seeds is at least as good as `goal`."""
        tables = [{int(row["step"]): row[self.metric] for row in run.evals} for run in runs]
        for step in sorted(set.intersection(*(set(table) for table in tables))):
            mean = fmean(table[step] for table in tables)
            if mean >= goal if self.greater_is_better else mean <= goal:
                return step
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the rows."""
        return _finite({**asdict(self), "rows": self.rows()})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("loratlas", "torch", "transformers", "peft", "accelerate", "datasets")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
