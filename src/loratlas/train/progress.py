"""What a run tells whoever watches it. The base class says nothing; `console` draws bars."""

from __future__ import annotations

from loratlas.train.facts import Facts
from loratlas.train.results import RunResult


class Progress:
    """Called in this order for each run: prepared, started, any of step and evaluated, finished."""

    def prepared(self, known: Facts) -> None:
        """The model is adapted and about to be trained."""

    def started(self, label: str, steps: int) -> None:
        """A run of `steps` optimizer steps begins."""

    def step(self, step: int, loss: float) -> None:
        """Optimizer step `step` is done; `loss` is its mean loss."""

    def evaluated(self, step: int, metric: str, value: float) -> None:
        """The test rows were evaluated after `step` steps."""

    def finished(self, result: RunResult) -> None:
        """The run is over and its result written."""
