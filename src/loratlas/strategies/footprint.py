"""What training keeps beside the weights: gradients and the optimizer's state, predicted and measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

_ADAM = 2  # tensors of a parameter's size that Adam keeps of it


class Footprint(NamedTuple):
    """Bytes on the device: gradients, and the optimizer's state. What is the same for all (weights, activations) is not
    in it."""

    gradients: int = 0
    optimizer: int = 0

    def larger(self, other: Footprint) -> Footprint:
        """The larger of each."""
        return Footprint(*map(max, self, other))

    def __str__(self) -> str:
        return f"{_size(self.gradients)} of gradients and {_size(self.optimizer)} of optimizer state"


def with_adam(trained: Iterable[nn.Parameter], kept: Iterable[nn.Parameter]) -> Footprint:
    """Of Adam, if `trained` have gradients and `kept` have moments."""
    return Footprint(_bytes(trained), _ADAM * _bytes(kept))


def gradients_of(optimizer: Optimizer) -> int:
    """Bytes of the gradients that are there now."""
    grads = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return _bytes(grads)


def state_of(optimizer: Optimizer) -> int:
    """Bytes of the state that lies where its parameters are; counters are left out."""
    return sum(
        _bytes([value])
        for p, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim() and value.device == p.device
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
