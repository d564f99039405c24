"""When a layer recomposes: a plan made of numbers that are known before training."""

from __future__ import annotations

import math
from typing import NamedTuple


class Plan(NamedTuple):
    """`per_event` pairs at most `events` times, every `interval` steps."""

    per_event: int
    events: int
    interval: int

    @classmethod
    def of(cls, r: int, r_target: int, gamma: float, total_steps: int, schedule: str) -> Plan:
        """r' = max(1, floor(gamma r)), N_switch = floor((r_target - r) / r'), t_interval = floor(N / N_switch).

        "spread" divides by N_switch + 1, so that the last pairs train as long as the others; with "paper" the last
        event falls on the final step and is skipped.
        """
        per_event = max(1, math.floor(gamma * r + 1e-9)) if gamma > 0 else 0
        events = (r_target - r) // per_event if per_event else 0
        if events <= 0 or total_steps <= 0:
            return cls(per_event, 0, 0)
        parts = events if schedule == "paper" else events + 1
        return cls(per_event, events, max(1, total_steps // parts))

    def steps(self, total_steps: int) -> range:
        """The steps after which the plan has an event, in a run of `total_steps`; never the last one."""
        if not self.events:
            return range(0)
        return range(self.interval, min(self.events * self.interval + 1, total_steps), self.interval)
