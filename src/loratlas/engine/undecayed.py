"""Parameters that weight decay leaves alone, in whatever groups the user's optimizer has them.

For the time of a step they form groups of their own without decay; the optimizer does the rest, whether its decay is
decoupled or not. Before and after it the groups are the user's: checkpoints and schedulers know nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


class Undecayed:
    """`enter` right before the optimizer's step, `leave` right after it."""

    def __init__(self, optimizer: Optimizer, params: Iterable[Tensor]) -> None:
        self.optimizer = optimizer
        self.spared = {id(p) for p in params}
        self._moved: list[tuple[list[Tensor], list[Tensor]]] = []  # (a group's own list, what stood in it)
        self._groups = 0  # that stand behind the user's

    def enter(self) -> None:
        self.leave()  # an earlier step that ended with an error never came to it
        for group in list(self.optimizer.param_groups):
            spared = [p for p in group["params"] if id(p) in self.spared] if group.get("weight_decay", 0) else []
            if spared:
                self._moved.append((group["params"], list(group["params"])))
                group["params"][:] = [p for p in group["params"] if id(p) not in self.spared]
                self.optimizer.param_groups.append({**group, "params": spared, "weight_decay": 0.0})
                self._groups += 1

    def leave(self) -> None:
        for own, whole in self._moved:
            own[:] = whole
        if self._groups:
            del self.optimizer.param_groups[-self._groups :]
        self._moved, self._groups = [], 0
