"""Intervals, corrections and verdicts, checked against numbers worked out by hand or by another route."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from loratlas.train.statistics import NoiseFloor, Verdict, holm, interval, judge, noise_floor, paired

BASE = {0: 0.50, 1: 0.52, 2: 0.54}


def above(*gains: float) -> dict[int, float]:
    return {seed: BASE[seed] + gain for seed, gain in enumerate(gains)}


def test_the_interval_is_students() -> None:
    values = [0.1, 0.3, 0.2, 0.4]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)
    # t(0.975, 2) = 4.303 and a standard deviation of 1
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    single = interval([0.7])
    assert (single.mean, single.half, single.p, single.excludes_zero) == (0.7, None, None, False)
    assert interval([0.5, 0.5]).p == 0.0
    assert interval([0.0, 0.0]).p == 1.0


def test_pairing_removes_what_the_seeds_share() -> None:
    shifted = paired({0: 0.61, 1: 0.73, 2: 0.94}, {0: 0.60, 1: 0.70, 2: 0.92, 9: 0.1})
    assert (shifted.n, shifted.mean) == (3, pytest.approx(0.02))
    assert shifted.half == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_holm_steps_down() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_the_noise_floor_is_the_size_of_re_run_differences() -> None:
    floor = noise_floor({0: 0.5, 1: 0.5, 2: 0.5}, {1000: 0.53, 1001: 0.46, 1005: 0.9}, 1000)
    assert floor.level == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2))
    assert (floor.difference.n, floor.difference.mean) == (2, pytest.approx(-0.005))
    assert noise_floor({}, {1000: 0.5}, 1000) is None


def verdict(floor: float | None = 0.01, greater: bool = True, **methods: dict[int, float]) -> Verdict:
    noise = None if floor is None else NoiseFloor(interval([0.0, 0.0]), floor)
    return judge({"lora": BASE, **methods}, "lora", noise, greater_is_better=greater)


CLEAR, WIDE = (0.10, 0.11, 0.12), (0.00, 0.10, 0.20)


def test_a_winner_must_pass_every_rule() -> None:
    won = verdict(a=above(*CLEAR), b=above(0.03, 0.04, 0.03))
    assert (won.winner, won.why, won.runner_up) == ("a", "winner", "b")
    assert won.better == ["a", "b"]
    assert verdict(a=above(*WIDE)).why == "no difference"
    assert verdict(floor=0.2, a=above(*CLEAR)).why == "noise"
    assert verdict(floor=None, a=above(*CLEAR)).winner == "a"
    tied = verdict(a=above(*CLEAR), b=above(0.11, 0.10, 0.11))
    assert (tied.winner, tied.why, tied.leader) == (None, "tie", "a")


def test_a_leader_below_an_uncertain_method_has_not_won() -> None:
    found = verdict(a=above(*CLEAR), b=above(0.05, 0.15, 0.25))
    assert (found.winner, found.why, found.runner_up) == (None, "tie", "b")


def test_the_sign_follows_the_metric() -> None:
    found = verdict(greater=False, a=above(-0.10, -0.11, -0.12), b=above(*CLEAR))
    assert (found.winner, found.worse) == ("a", ["b"])
    assert verdict(a=above(-0.10, -0.11, -0.12)).worse == ["a"]


def test_holm_decides_and_not_the_single_interval() -> None:
    edge = above(0.02, 0.05, 0.08)  # p = 0.074 / 2 comparisons would not do; alone its interval is what is asked
    p = interval([0.02, 0.05, 0.08]).p
    assert p > 0.05
    near = above(0.030, 0.050, 0.062)
    alone = interval([0.030, 0.050, 0.062])
    assert alone.excludes_zero
    assert 0.025 < alone.p < 0.05
    assert verdict(a=near).winner == "a"
    assert verdict(a=near, b=edge, c=above(*WIDE)).why == "no difference"


def test_what_cannot_be_judged() -> None:
    assert verdict().why == "one method"
    assert judge({"lora": {0: 0.5}, "a": {0: 0.9}}, "lora", None, greater_is_better=True).why == "one seed"
    assert judge({"lora": {}, "a": BASE}, "lora", None, greater_is_better=True).why == "incomplete"
