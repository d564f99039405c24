"""What a reader must know before believing the table, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from loratlas.train.plan import Plan
from loratlas.train.results import Comparison


def rules(plan: Plan, steps: Mapping[str, int], result: Comparison) -> list[str]:
    """Seeds and budget, where the learning rates come from, what the intervals mean."""
    count = "One seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds"
    doubt = " Differences of a few points are within what another seed changes." if len(plan.seeds) == 1 else ""
    notes = [f"{count}, {_budget(plan, steps)}, {_rates(plan)}.{doubt}"]
    if len(plan.seeds) > 1:
        notes.append(
            "± is Student's 95 % interval over seeds, of differences paired by seed; it says how far other seeds would "
            "move a result, not how far other test rows would. The verdict corrects for several methods by Holm's rule."
        )
    if any(run.shared for run in result.runs):
        notes.append("Runs shared the machine, so their step times are not compared.")
    return notes


def _budget(plan: Plan, steps: Mapping[str, int]) -> str:
    if plan.minutes is None:
        return f"{plan.spec.steps} steps"
    each = ", ".join(f"{slug} {count}" for slug, count in steps.items())
    return f"{plan.minutes:g} minutes of training a run (steps: {each})"


def _rates(plan: Plan) -> str:
    if plan.grid:
        grid = ", ".join(f"{rate:g}" for rate in plan.grid)
        length = "" if plan.search_steps is None else f" in {plan.search_steps} steps"
        further = f" (and up to {plan.widen} beyond, where the best was the outermost)" if plan.widen else ""
        return f"each method at the best learning rate of {grid}{further} on held-out training rows{length}"
    if plan.spec.learning_rate is not None:
        return f"all methods at learning rate {plan.spec.learning_rate:g}; nothing was tuned on these data"
    return "each method at its catalogued learning rate; nothing was tuned on these data"
