"""Adafactor's rule, as T5 was trained with (Shazeer & Stern 2018, arXiv 1804.04235)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.optim.rules import Group, Rule, State


class Adafactor(Rule):
    """The second moment of a matrix as the outer product of its row and column means; of a vector in full.

        beta_t = 1 - t^decay_rate
        row, col <- moving averages of the means of R^2 + eps_0
        u = R (row / mean(row))^-1/2 col^-1/2;  u <- rate u / max(1, rms(u) / clip_threshold)
        N = u, or with group["beta1"] its moving average

    rate is lr, or under group["relative_step"] min(10^-2, t^-1/2) (min(10^-6 t, t^-1/2) with group["warmup_init"]),
    times max(eps_1, rms(W)) under group["scale_parameter"]. It is part of N: the size of a step is 1. Weight decay
    comes before the step and is multiplied with the same rate. group["eps"] = (eps_0, eps_1).
    """

    moments = ("exp_avg",)

    def check(self, group: Group) -> None:
        if group["relative_step"] and group["lr"] is not None:
            raise UserError(
                "relative_step makes its own learning rate: set lr to None, or relative_step to False.", "lr"
            )
        if not group["relative_step"] and group["lr"] is None:
            raise UserError("Adafactor without relative_step needs a learning rate: set lr.", "lr")
        if group["warmup_init"] and not group["relative_step"]:
            raise UserError("warmup_init is a form of relative_step: set relative_step as well.", "warmup_init")

    def decays_first(self, group: Group) -> bool:
        return True

    def rates(self, group: Group, weights: Sequence[Tensor], age: int) -> list[Any]:
        rate = group["lr"]
        if group["relative_step"]:
            rate = min(1e-6 * age if group["warmup_init"] else 1e-2, age**-0.5)
        if not group["scale_parameter"]:
            return [rate] * len(weights)
        return [rate * _rms(weight).clamp(min=group["eps"][1]) for weight in weights]

    def normalise(
        self, grads: list[Tensor], states: list[State], group: Group, age: int, rates: list[Any]
    ) -> tuple[list[Tensor], float]:
        forget = age ** group["decay_rate"]
        steps = []
        for grad, state, rate in zip(grads, states, rates, strict=True):
            step = self._factored(grad, state, group["eps"][0], forget)
            step.div_((_rms(step) / group["clip_threshold"]).clamp(min=1.0)).mul_(rate)
            if group["beta1"] is not None:
                average = state.setdefault("exp_avg", torch.zeros_like(step))
                step = average.lerp_(step, 1 - group["beta1"]).clone()
            steps.append(step)
        return steps, 1.0

    def _factored(self, grad: Tensor, state: State, eps: float, forget: float) -> Tensor:
        square = grad.square().add_(eps)
        if grad.dim() < 2:
            return grad * state.setdefault("exp_avg_sq", torch.zeros_like(grad)).lerp_(square, forget).rsqrt()
        row, col = square.mean(-1), square.mean(-2)
        row = state.setdefault("exp_avg_sq_row", torch.zeros_like(row)).lerp_(row, forget)
        col = state.setdefault("exp_avg_sq_col", torch.zeros_like(col)).lerp_(col, forget)
        scale = (row / row.mean(-1, keepdim=True)).rsqrt_()
        return grad * scale.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)

    def take(self, state: State, dim: int, source: Tensor, kept: Tensor) -> None:
        super().take(state, dim, source, kept)
        # the mean of the other entries for those that are new: a factor of 0 would make the next step infinite
        name = ("exp_avg_sq_row", "exp_avg_sq_col")[dim]
        if name in state:
            old = state[name].index_select(0, source)
            mean = (old * kept).sum() / kept.sum().clamp(min=1)
            state[name] = torch.where(kept, old, mean)

    def forget(self, state: State) -> None:
        super().forget(state)
        for name in ("exp_avg_sq_row", "exp_avg_sq_col"):
            if name in state:
                state[name].zero_()


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt() if x.dtype != torch.float64 else x.square().mean().sqrt()
