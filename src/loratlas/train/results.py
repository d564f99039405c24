"""What runs and comparisons leave behind: plain data, written as JSON."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from statistics import fmean
from typing import Any

from loratlas.train.statistics import NoiseFloor, Verdict, holm, interval, judge, noise_floor, paired

SHIFT = 1000  # seed of a re-run minus seed of the run


@dataclass
class RunResult:
    """One run.

    Attributes:
        method, label: slug and name of the method, or slugs and names of several as "srlora+lora-pro".
        final: headline metric after the last step (of the last good state if the run diverged).
        history: [{"step", "loss", "grad_norm", "learning_rate"}] of every step.
        evals: [{"step", "eval_loss", <every metric>}].
        step_seconds: median time of an optimizer step, without evaluations.
        training_seconds: time of all optimizer steps, without evaluations.
        seconds: time of the whole training, with evaluations.
        setup_seconds: time of making the adapter, with the calibration pass of methods that need one.
        peak_memory_bytes: of set-up and training, see `memory`; None where it is not known.
        events: recompositions of the adapter (see `analysis.recomposition`), empty for most methods.
        recomposition: where each layer stands then. fresh: the learning rate of pairs that have just started again.
        ranks: how the rank of each layer moved (see `analysis.ranks`), empty for most methods.
        diverged_at: step whose loss or gradient was not finite, None if all went well.
        adapter_dir: the trained adapter, as PEFT saves it; empty where it was not kept.
        model_dir: the whole model, where no adapter but the base model's own weights trained.
        parts: {slug: options with every default} of optimizer, objective and strategy.
        remarks: what a strategy says after training, such as the memory that was used.
        adapted_modules, scaling, export_rank: see `facts.Facts`.
        labels: names of the classes, None for tasks without.
        shared: other runs used the machine at the same time, so that times do not compare.
        used_parameters: what the ranks in use at the end amount to, where ranks move and `trainable_parameters` counts
            the room that they have; None for other methods.
        forget: {"rows", "before", "after"}: the task's loss on the forget set before and after training, None without.
        forgetting: see `forgetting`, None where it was not measured.
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
    model_dir: str = ""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    setup_seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    recomposition: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    diverged_at: int | None = None
    adapted_modules: int = 0
    scaling: tuple[float, float] | None = None
    export_rank: int | None = None
    labels: list[str] | None = None
    training_seconds: float = 0.0
    shared: bool = False
    forgetting: dict[str, Any] | None = None
    forget: dict[str, Any] | None = None
    used_parameters: int | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def to_dict(self) -> dict[str, Any]:
        """As JSON; a number that is not finite, as a diverged run may have, becomes null."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RunResult:
        """What `to_dict` gave; raises TypeError if a field is missing or unknown."""
        result = cls(**value)
        result.final = math.nan if result.final is None else result.final
        return result


@dataclass
class Comparison:
    """Several runs on the same work.

    Attributes:
        task: one line about the data. baseline: slug of the method that the others are measured against.
        runs: those that count. noise_runs: the baseline again, under its seeds + `SHIFT`. search_runs: those of the
            learning-rate search. timing_runs: those that turned minutes into steps.
        rates: {slug: learning rate found by the search}.
        failures: [{"run", "reason"}] of runs that did not come to an end.
        notes: sentences that belong under the leaderboard.
        complete: no run is left to do.
    """

    task: str
    metric: str
    greater_is_better: bool
    baseline: str
    runs: list[RunResult] = field(default_factory=list)
    noise_runs: list[RunResult] = field(default_factory=list)
    search_runs: list[RunResult] = field(default_factory=list)
    timing_runs: list[RunResult] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def finals(self) -> dict[str, dict[int, float]]:
        """{method: {seed: final metric}} of the runs that have one."""
        result: dict[str, dict[int, float]] = {run.method: {} for run in self.runs}
        for run in self.runs:
            if math.isfinite(run.final):
                result[run.method][run.seed] = run.final
        return result

    def noise(self) -> NoiseFloor | None:
        again = {run.seed: run.final for run in self.noise_runs if math.isfinite(run.final)}
        return noise_floor(self.finals().get(self.baseline, {}), again, SHIFT)

    def verdict(self) -> Verdict:
        return judge(self.finals(), self.baseline, self.noise(), greater_is_better=self.greater_is_better)

    def rows(self) -> list[dict[str, Any]]:
        """The leaderboard: one row a method, in the order of the runs (columns: `wording`)."""
        groups: dict[str, list[RunResult]] = {}
        for run in self.runs:
            groups.setdefault(run.method, []).append(run)
        lora = groups.get("lora") or groups.get("peft-lora") or []
        finals = self.finals()
        standard = finals.get(self.baseline, {})
        goal = fmean(standard.values()) if standard else None
        differences = {slug: paired(own, standard) for slug, own in finals.items() if slug != self.baseline}
        adjusted = holm({slug: d.p for slug, d in differences.items() if d is not None and d.p is not None})
        rows = []
        for slug, runs in groups.items():
            own = list(finals[slug].values())
            difference = differences.get(slug)
            row = {
                "method": slug,
                "label": runs[0].label,
                "values": [run.final for run in runs],
                "interval": asdict(interval(own)) if own else None,
                "difference": None if difference is None else {**asdict(difference), "p_holm": adjusted.get(slug)},
                "learning_rate": runs[0].learning_rate,
                "steps": runs[0].steps,
                "trainable_parameters": runs[0].trainable_parameters,
                "used_parameters": _used(runs),
                "steps_to_baseline": None if goal is None else self._steps_to(goal, runs),
                "relative_step_time": _relative_time(runs, lora),
                "peak_memory_bytes": max((run.peak_memory_bytes or 0 for run in runs), default=0) or None,
                "forgetting": _forgetting(runs),
            }
            rows.append(row)
        return rows

    def _steps_to(self, goal: float, runs: list[RunResult]) -> int | None:
        """First evaluated step at which the mean over seeds is at least as good as `goal`."""
        tables = [{int(row["step"]): row[self.metric] for row in run.evals} for run in runs]
        for step in sorted(set.intersection(*(set(table) for table in tables))):
            mean = fmean(table[step] for table in tables)
            if mean >= goal if self.greater_is_better else mean <= goal:
                return step
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the rows, the noise floor and the verdict."""
        noise = self.noise()
        value = {**asdict(self), "rows": self.rows(), "noise": asdict(noise) if noise else None}
        return _finite({**value, "verdict": asdict(self.verdict())})


def _relative_time(runs: list[RunResult], lora: list[RunResult]) -> float | None:
    """Mean step time over LoRA's; None without LoRA, or if a run had to share the machine."""
    if not lora or any(run.shared for run in (*runs, *lora)):
        return None
    return fmean(run.step_seconds for run in runs) / fmean(run.step_seconds for run in lora)


def _used(runs: list[RunResult]) -> int | None:
    """Mean over the runs; None where ranks do not move, or a run of an earlier version does not say."""
    used = [run.used_parameters for run in runs if run.used_parameters is not None]
    return round(fmean(used)) if len(used) == len(runs) else None


def _forgetting(runs: list[RunResult]) -> dict[str, Any] | None:
    """{"metric", "before", "after", "change"}, the change with its interval over seeds."""
    found = [run.forgetting for run in runs if run.forgetting is not None]
    if not found:
        return None
    change = interval([each["after"] - each["before"] for each in found])
    after = fmean(each["after"] for each in found)
    return {"metric": found[0]["metric"], "before": found[0]["before"], "after": after, "change": asdict(change)}


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
