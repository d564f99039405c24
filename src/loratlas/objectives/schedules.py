"""Weights that follow the step: factors in [0, 1] of step s = 0..S-1 of S optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable

FADING = ("constant", "cosine")
RISING = ("constant", "two_phase", "linear_warmup", "quadratic_warmup")


def cosine(step: int, total: int, floor: float = 0.1) -> float:
    """floor + (1 - floor) (1 + cos(pi s / S)) / 2: from 1 down to `floor`."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * step / max(total, 1)))


def two_phase(step: int, total: int, warmup: float, ramp: float) -> float:
    """0 for the first int(warmup S) steps, then up by a line of max(int(ramp S), 1) steps that starts at 0, then 1."""
    late = step - int(warmup * total)
    return min(max(late, 0) / max(int(ramp * total), 1), 1.0)


def power_warmup(step: int, total: int, warmup: float, power: int) -> float:
    """(s / int(warmup S))^power until s = int(warmup S), then 1."""
    length = int(warmup * total)
    return 1.0 if step >= length else (step / length) ** power


def rising(name: str, step: int, total: int, warmup: float, ramp: float) -> float:
    """The factor of one of `RISING`."""
    made: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "two_phase": lambda: two_phase(step, total, warmup, ramp),
        "linear_warmup": lambda: power_warmup(step, total, warmup, 1),
        "quadratic_warmup": lambda: power_warmup(step, total, warmup, 2),
    }
    return made[name]()
