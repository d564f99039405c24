"""What a few seeds allow one to say: paired differences, their intervals, and whether there is a winner.

With differences d_i = a_i - b_i of two methods under the same seeds i = 1..n,

    mean +- t(0.975, n - 1) * s / sqrt(n),        s the standard deviation of the d_i (n - 1 in the denominator)

is the two-sided 95 % interval of Student (1908). The p-values of several methods against one baseline are corrected by
Holm's step-down rule (1979), which holds the chance of any false claim below 5 % whatever the dependence between them.
The intervals say how far other seeds would move a result, not how far other test rows would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy.stats import t as student

LEVEL = 0.95
_ALPHA = 1.0 - LEVEL

Finals = Mapping[int, float]  # final metric by seed


@dataclass(frozen=True)
class Interval:
    """mean +- half of n values, and the p-value of "their mean is 0"; half and p are None for a single value."""

    mean: float
    half: float | None
    n: int
    p: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class NoiseFloor:
    """The baseline against its own re-run under other seeds.

    Attributes:
        difference: re-run minus first run, over pairs of runs.
        level: root mean square of these differences: how far apart two runs of one configuration typically are.
    """

    difference: Interval
    level: float


@dataclass(frozen=True)
class Verdict:
    """Who won, if anybody did.

    Attributes:
        winner: slug, None for no winner.
        why: "winner", or the reason for none: "one method", "one seed" (no interval), "incomplete" (the baseline has
            no result), "no difference" (no corrected p-value below 0.05 in the good direction), "noise" (the gain is
            not above the noise floor) or "tie" (the leader is not told apart from the runner-up).
        leader: best mean among the methods that beat the baseline.
        runner_up: best mean among all other methods but the baseline.
        lead: leader minus runner_up, paired by seed.
        better, worse: methods that differ from the baseline after the correction.
    """

    winner: str | None
    why: str
    leader: str | None = None
    runner_up: str | None = None
    lead: Interval | None = None
    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of `values` (at least one). Equal values give half 0."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return Interval(mean, None, n, None)
    error = stdev(values) / math.sqrt(n)
    if error == 0.0:
        return Interval(mean, 0.0, n, 1.0 if mean == 0.0 else 0.0)
    half = float(student.ppf(0.5 + LEVEL / 2, n - 1)) * error
    return Interval(mean, half, n, 2.0 * float(student.sf(abs(mean) / error, n - 1)))


def paired(finals: Finals, other: Finals) -> Interval | None:
    """finals minus other over the seeds that both have; None if there is none."""
    seeds = [seed for seed in finals if seed in other]
    return interval([finals[seed] - other[seed] for seed in seeds]) if seeds else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: max over j <= k of min(1, (m - j + 1) p_(j)) for the k-th smallest of m."""
    adjusted, worst = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = worst
    return adjusted


def noise_floor(first: Finals, again: Finals, shift: int) -> NoiseFloor | None:
    """First runs by seed, re-runs by seed + shift; None while no pair is there."""
    pairs = [(first[seed - shift], value) for seed, value in again.items() if seed - shift in first]
    if not pairs:
        return None
    differences = [value - before for before, value in pairs]
    return NoiseFloor(interval(differences), math.sqrt(fmean(d * d for d in differences)))


def judge(finals: Mapping[str, Finals], baseline: str, floor: NoiseFloor | None, *, greater_is_better: bool) -> Verdict:
    """The verdict over {method: finals}; without a floor the gain need not exceed one.

    A winner beats the baseline (Holm's p below 0.05) by more than the noise floor, and its paired interval against the
    next best method excludes 0.
    """
    others = [method for method in finals if method != baseline and finals[method]]
    if not others:
        return Verdict(None, "one method")
    if not finals.get(baseline):
        return Verdict(None, "incomplete")
    sign = 1.0 if greater_is_better else -1.0
    gains = {method: found for method in others if (found := paired(finals[method], finals[baseline])) is not None}
    adjusted = holm({method: gain.p for method, gain in gains.items() if gain.p is not None})
    if not adjusted:
        return Verdict(None, "one seed")
    told = [method for method, p in adjusted.items() if p < _ALPHA]
    better = [method for method in told if sign * gains[method].mean > 0]
    worse = [method for method in told if sign * gains[method].mean < 0]
    if not better:
        return Verdict(None, "no difference", better=better, worse=worse)

    def mean(method: str) -> float:
        return sign * fmean(finals[method].values())

    leader = max(better, key=mean)
    rest = [method for method in others if method != leader]
    runner_up = max(rest, key=mean) if rest else None
    lead = paired(finals[leader], finals[runner_up]) if runner_up is not None else None
    clear = runner_up is None or (lead is not None and lead.excludes_zero and sign * lead.mean > 0)
    above = floor is None or abs(gains[leader].mean) > floor.level
    why = "noise" if not above else "winner" if clear else "tie"
    return Verdict(leader if why == "winner" else None, why, leader, runner_up, lead, better, worse)
