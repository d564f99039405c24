"""Updates inside the backward pass: a parameter steps when its gradient is complete, and the gradient is freed.

So at most a few gradients are alive at a time. The loop stays as it is: `optimizer.step()` after every backward pass
marks the end of a step. What needs all gradients at once cannot work: accumulation over several backward passes,
clipping by their common norm, loss scaling, and DistributedDataParallel, which averages them later.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from loratlas.engine.sharded import several_ranks
from loratlas.errors import UserError


class Layerwise:
    """The hooks of one optimizer; they end with it.

    Raises:
        UserError: made in one of several processes; a gradient arrives twice without `optimizer.step()` between.
    """

    def __init__(self, optimizer: Any) -> None:
        if several_ranks():
            raise UserError(
                "layerwise updates happen before the ranks have averaged a gradient: turn layerwise off, or train on "
                "one device."
            )
        # weak: a hook lives as long as its parameter, and must not step it for an optimizer that nobody uses any more
        self._optimizer = weakref.ref(optimizer)
        self._stepped: set[int] = set()

    def watch(self, group: int, parameters: Iterable[Tensor]) -> None:
        """Step `parameters` of the optimizer's group of that number as they get their gradients."""
        for p in parameters:
            p.register_post_accumulate_grad_hook(functools.partial(self._arrived, group))

    def end_of_step(self) -> None:
        self._stepped.clear()

    def _arrived(self, group: int, parameter: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if id(parameter) in self._stepped:
            raise UserError(
                f"layerwise updates use up a gradient as it comes, and that of {optimizer.name_of(parameter)} came "
                "twice in one step: set gradient_accumulation_steps to 1, and call optimizer.step() after every "
                "backward pass."
            )
        self._stepped.add(id(parameter))
        optimizer.update([(optimizer.param_groups[group], [parameter])])
        parameter.grad = None
