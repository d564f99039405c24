"""What a run tells whoever watches it. The base class says nothing; `console` draws bars."""

from __future__ import annotations

from loratlas.train.facts import Facts
from loratlas.train.results import RunResult


class Progress:
    """Called in this order for each run: prepared, started, any of step and evaluated, finished."""

    def described(self, description: str) -> None:
        """The data of a comparison are read and everything fits; `description` says what they are."""

    def prepared(self, known: Facts) -> None:
        """The model is adapted and about to be trained."""

    def one_run(self) -> Progress:
        """What one run reports to, when others may go on at the same time."""
        return self

    def started(self, label: str, steps: int) -> None:
        """A run of `steps` optimizer steps begins."""

    def step(self, step: int, loss: float) -> None:
        """Optimizer step `step` is done; `loss` is its mean loss."""

    def evaluated(self, step: int, metric: str, value: float) -> None:
        """The test rows were evaluated after `step` steps."""

    def finished(self, result: RunResult) -> None:
        """The run is over and its result written."""


class Labelled(Progress):
    """Hands everything on under a name of its own: many runs of a comparison are of one method."""

    def __init__(self, inner: Progress, label: str) -> None:
        self._inner, self._label = inner, label
        self.step, self.evaluated, self.finished = inner.step, inner.evaluated, inner.finished  # type: ignore[method-assign]

    def started(self, label: str, steps: int) -> None:
        self._inner.started(self._label, steps)
