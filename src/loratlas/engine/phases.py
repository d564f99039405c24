"""Phases of one run: which step belongs to which, what the learning rate does in each, optimizers that start again.

    phases = Phases((100, 50, 50))          # optimizer steps of each
    phases.at(101), phases.begins(101)      # 1, True: steps count from 1, phases from 0
    phases.pace(scheduler, "each")          # every phase runs through the scheduler's whole curve
    start_again(optimizer, params)          # no moments, no step count, as in a new optimizer

Everything follows from the number of the step, so that there is nothing to save and a resumed run goes on by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.optim import Adagrad, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loratlas.errors import UserError

CURVES = ("each", "first")


@dataclass(frozen=True)
class Phases:
    """lengths: optimizer steps of each phase, in order; a phase of 0 steps never comes."""

    lengths: tuple[int, ...]

    @classmethod
    def split(cls, total: int, parts: int, first: float | None = None) -> Phases:
        """`total` steps in `parts` phases of equal length, up to one step; `first` is the first one's share instead."""
        if first is None or parts == 1:
            ends = [total * (i + 1) // parts for i in range(parts)]
        else:
            head = round(first * total)
            ends = [head + (total - head) * i // (parts - 1) for i in range(parts)]
        return cls(tuple(end - start for start, end in zip([0, *ends], ends, strict=False)))

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def at(self, step: int) -> int:
        """The phase of optimizer step `step`, from 1; steps beyond the plan belong to the last phase."""
        return min(bisect_left(list(accumulate(self.lengths)), step), len(self.lengths) - 1)

    def start(self, phase: int) -> int:
        """Optimizer steps that are done when `phase` begins."""
        return sum(self.lengths[:phase])

    def begins(self, step: int) -> bool:
        """Whether `step` is the first one of its phase."""
        return step == self.start(self.at(step)) + 1

    def pace(self, scheduler: Any, curve: str) -> None:
        """Bend the curve of a scheduler over `total` steps, which the user made for the whole run, in place.

        "each": every phase runs through it from its start (warm-up and all) to its end. "first": the first phase does,
        and later ones stay at its end. Pacing it again begins from the user's curve, not from a bent one.

        Raises:
            UserError: the scheduler is no LambdaLR, whose curve would be a function of the step.
        """
        if not isinstance(scheduler, LambdaLR):
            raise UserError(
                f"{type(scheduler).__name__} cannot be started again at every phase: use a LambdaLR, such as those of "
                "transformers.get_scheduler."
            )
        scheduler.lr_lambdas = [self._bent(factor, curve) for factor in scheduler.lr_lambdas]

    def _bent(self, factor: Any, curve: str) -> Callable[[int], float]:
        plain = getattr(factor, "plain", factor)

        def bent(done: int) -> float:
            phase = 0 if curve == "first" else self.at(done + 1)
            share = min(1.0, (done - self.start(phase)) / self.lengths[phase]) if self.lengths[phase] else 1.0
            return float(plain(share * self.total))

        bent.plain = plain  # type: ignore[attr-defined]
        return bent


def start_again(optimizer: Optimizer, params: Iterable[Tensor] | None = None) -> None:
    """Let `optimizer` go on with `params` (None: with all of its own) as if it had never made a step with them.

    Groups, rates and the parameters themselves stay.

    Raises:
        UserError: Adagrad, which makes its state when it is built and not when it is needed.
    """
    if isinstance(optimizer, Adagrad):
        raise UserError("Adagrad cannot start again in the middle of a run: use AdamW, or build a new optimizer.")
    for param in list(optimizer.state) if params is None else params:
        optimizer.state.pop(param, None)
