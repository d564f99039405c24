"""What a subspace optimizer does with a gradient once it is small: the rule of Adam, RMSProp or Adafactor.

A rule sees lists of tensors, projected gradients R or plain ones of parameters that are not projected, and knows
nothing of subspaces. It keeps its moments in the parameters' state and answers with normalised steps N and a number:

    W <- W - size * N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from loratlas.errors import UserError

State = dict[str, Any]
Group = dict[str, Any]
ORDERS = ("hf", "torch")
_FUSED = ("cpu", "cuda")


class Rule:
    """Attributes: moments: names of the state tensors that have a slice for every basis vector."""

    moments: tuple[str, ...] = ()

    def check(self, group: Group) -> None:
        """Raise `UserError` for options of a parameter group that are out of range."""

    def decays_first(self, group: Group) -> bool:
        """Whether weight decay comes before the step."""
        return False

    def rates(self, group: Group, weights: Sequence[Tensor], age: int) -> list[Any]:
        """Learning rates of the weights, numbers or 0-dim tensors, that weight decay is multiplied with."""
        return [group["lr"]] * len(weights)

    def normalise(
        self, grads: list[Tensor], states: list[State], group: Group, age: int, rates: list[Any]
    ) -> tuple[list[Tensor], float]:
        """Update the moments; N for every gradient, in its shape, and the size of the step.

        age: steps that the moments have behind them with this one, from 1.
        """
        raise NotImplementedError

    def plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: Group, age: int, rates: list[Any]
    ) -> None:
        """The whole step of parameters that are not projected, but for weight decay."""
        steps, size = self.normalise(grads, states, group, age, rates)
        torch._foreach_add_(weights, steps, alpha=-size)

    # -------------------------------------------------------------------- moments at a change of basis

    def read(self, state: State, name: str) -> Tensor:
        return state[name]

    def write(self, state: State, name: str, value: Tensor) -> None:
        state[name] = value

    def take(self, state: State, dim: int, source: Tensor, kept: Tensor) -> None:
        """Moments for new basis vectors along `dim`: those of the old vector `source[j]` where `kept[j]`, else 0."""
        for name in self.moments:
            if name in state:
                old = self.read(state, name)
                shape = [1] * old.dim()
                shape[dim] = -1
                self.write(state, name, old.index_select(dim, source).masked_fill_(~kept.view(shape), 0))

    def forget(self, state: State) -> None:
        """Set all moments to 0."""
        for name in self.moments:
            if name in state:
                self.write(state, name, torch.zeros_like(self.read(state, name)))


class AdamW(Rule):
    """Adam with decoupled weight decay, in one of two orders (group["order"]):

    | | "hf", as in transformers' old AdamW | "torch" |
    |---|---|---|
    | N | m / (sqrt(v) + eps) | m / (sqrt(v) + eps sqrt(1 - b2^t)) |
    | weight decay | after the step | before the step |

    The size of a step is lr sqrt(1 - b2^t) / (1 - b1^t), or lr without group["correct_bias"]: in the order "torch" the
    step is that of torch.optim.AdamW.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def check(self, group: Group) -> None:
        beta1, beta2 = group["betas"]
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise UserError(f"betas must lie in [0, 1), but they are {tuple(group['betas'])}.", field="betas")
        if group["order"] not in ORDERS:
            raise UserError(f"order must be one of {', '.join(ORDERS)}, but it is {group['order']!r}.", field="order")

    def decays_first(self, group: Group) -> bool:
        return group["order"] == "torch"

    def normalise(
        self, grads: list[Tensor], states: list[State], group: Group, age: int, rates: list[Any]
    ) -> tuple[list[Tensor], float]:
        beta1, beta2 = group["betas"]
        correction = (1 - beta2**age) ** 0.5 / (1 - beta1**age)
        steps = [torch.zeros_like(grad) for grad in grads]
        self._adam_(steps, grads, states, group, age, lr=-1 / correction)
        return steps, float(group["lr"]) * (correction if group["correct_bias"] else 1.0)

    def plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: Group, age: int, rates: list[Any]
    ) -> None:
        # one pass over weight, gradient and moments where they can share a kernel
        alike = all(grad.dtype == weight.dtype for weight, grad in zip(weights, grads, strict=True))
        if not alike or not group["correct_bias"]:
            return super().plain(weights, grads, states, group, age, rates)
        self._adam_(weights, grads, states, group, age, lr=float(group["lr"]))

    def _adam_(
        self, targets: list[Tensor], grads: list[Tensor], states: list[State], group: Group, age: int, lr: float
    ) -> None:
        """targets -= lr mhat / (sqrt(vhat) + eps'), by torch's own kernel; eps' makes the chosen order of it."""
        beta1, beta2 = group["betas"]
        eps = group["eps"] / (1 - beta2**age) ** 0.5 if group["order"] == "hf" else group["eps"]
        means, squares = (
            [self._moment(state, name, grad) for state, grad in zip(states, grads, strict=True)]
            for name in self.moments
        )
        grads = [grad.contiguous() for grad in grads]
        device = targets[0].device
        fused = device.type in _FUSED and all(target.is_contiguous() for target in targets)
        torch_adamw(
            targets,
            grads,
            means,
            squares,
            max_exp_avg_sqs=[],
            state_steps=list(torch.full((len(targets),), age - 1.0, device=device if fused else None).unbind()),
            fused=fused,
            foreach=not fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        for name, tensors in zip(self.moments, (means, squares), strict=True):
            for state, tensor in zip(states, tensors, strict=True):
                self.write(state, name, tensor)

    def _moment(self, state: State, name: str, grad: Tensor) -> Tensor:
        if name in state:
            return self.read(state, name)
        return torch.zeros_like(grad, memory_format=torch.contiguous_format)


class RMSProp(Rule):
    """N = R / (sqrt(v - mean^2) + eps), through a momentum buffer if group["momentum"] > 0; the step's size is lr.

    v <- beta v + (1 - beta) R^2; the mean, of R, only if group["centered"]. The official code ignores weight decay,
    here it is decoupled and comes after the step.
    """

    moments = ("square_avg", "grad_avg", "momentum_buffer")

    def check(self, group: Group) -> None:
        if not 0 <= group["beta"] < 1:
            raise UserError(f"beta must lie in [0, 1), but it is {group['beta']}.", field="beta")
        if group["momentum"] < 0:
            raise UserError(f"momentum must not be negative, but it is {group['momentum']}.", field="momentum")

    def normalise(
        self, grads: list[Tensor], states: list[State], group: Group, age: int, rates: list[Any]
    ) -> tuple[list[Tensor], float]:
        beta = group["beta"]
        squares = _kept("square_avg", states, grads)
        torch._foreach_mul_(squares, beta)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta)
        spread = [square.clone() for square in squares]
        if group["centered"]:
            means = _kept("grad_avg", states, grads)
            torch._foreach_lerp_(means, grads, 1 - beta)
            torch._foreach_addcmul_(spread, means, means, value=-1)
            torch._foreach_clamp_min_(spread, 0)
        torch._foreach_sqrt_(spread)
        torch._foreach_add_(spread, group["eps"])
        steps = list(torch._foreach_div(grads, spread))
        if group["momentum"] > 0:
            buffers = _kept("momentum_buffer", states, grads)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = [buffer.clone() for buffer in buffers]
        return steps, float(group["lr"])


def _kept(name: str, states: list[State], like: list[Tensor]) -> list[Tensor]:
    for state, tensor in zip(states, like, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(tensor)
    return [state[name] for state in states]
