"""What is added to the output of a layer, x eps^T, so that it computes with W + eps while W stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from loratlas.engine.pair_registry import LowRankPair
from loratlas.linalg.stacks import in_stacks, row_squares

_ROWS = 1024  # rows of W that are copied to float32 at one time
_TINY = 1e-12


class Noise(NamedTuple):
    """eps = diag(std) Z with Z standard normal, made anew from `key` wherever it is needed and kept nowhere."""

    std: Tensor  # (out,)
    key: int

    def __call__(self, x: Tensor) -> Tensor:
        return _NoisyLinear.apply(x, self.std, self.key)


class Direction(NamedTuple):
    """eps = up @ down, (out, k) and (k, in), without gradients to either."""

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


Term = Noise | Direction


class _NoisyLinear(torch.autograd.Function):
    """x eps^T, (..., out); saved for backward are `std` and the key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, std: Tensor, key: int) -> Tensor:
        device = x.device.type
        ctx.key, ctx.n_in, ctx.dtype = key, x.shape[-1], x.dtype
        ctx.save_for_backward(std)
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            ctx.dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(ctx.dtype), noise(std, ctx.n_in, key, ctx.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (std,) = ctx.saved_tensors
        with torch.autocast(std.device.type, enabled=False):
            return grads[0] @ noise(std, ctx.n_in, ctx.key, grads[0].dtype), None, None


def noise(std: Tensor, n_in: int, key: int, dtype: torch.dtype) -> Tensor:
    """diag(std) Z, (out, n_in): the same for the same key, dtype and kind of device."""
    generator = torch.Generator(std.device).manual_seed(key)
    drawn = torch.randn(len(std), n_in, generator=generator, device=std.device, dtype=dtype)
    return drawn.mul_(std.to(dtype)[:, None])


def noise_std(pair: LowRankPair, grad_rows: Tensor | None, sigma: float, beta: float) -> Tensor:
    """std_i = sigma / sqrt(in) sqrt(||W'_i||^2 + beta ||g_i||^2), (out,), with W' = W + the adapter's update.

    grad_rows: ||g_i||^2, (out,); None for g = 0.
    """
    down, up = (factor.to(_real(factor)) for factor in pair.update())
    # ||W_i + U_i D||^2 from W D^T, so that no W' is made
    cross = torch.cat([_cross(rows, down) for rows in pair.weight().split(_ROWS)])
    squares = cross[:, 0] + 2.0 * (cross[:, 1:] * up).sum(1) + row_squares(up, down)
    if grad_rows is not None:
        squares = squares + beta * grad_rows
    return squares.clamp_min_(0.0).div_(pair.shape[1]).sqrt_().mul_(sigma)


def _cross(rows: Tensor, down: Tensor) -> Tensor:
    """[||W_i||^2, W_i D^T] of some rows of W."""
    exact = rows.to(down.dtype)
    return torch.cat((exact.square().sum(1, keepdim=True), exact @ down.T), dim=1)


def _real(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def gradient_rows(pairs: Sequence[LowRankPair]) -> list[Tensor]:
    """||g_i||^2, (out,), of every pair: the rows of g = s (gB A + B gA), LoRA's stand-in for the gradient of W."""

    def rows(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, s: Tensor) -> tuple[Tensor]:
        return (s.square()[:, None] * row_squares(torch.cat((grad_b, b), dim=2), torch.cat((a, grad_a), dim=1)),)

    return [found for (found,) in in_stacks(rows, _items(pairs, [pair.gradients() for pair in pairs]))]


def momentum_directions(
    pairs: Sequence[LowRankPair], optimizer: Optimizer, grad_norms: Sequence[Tensor], rho: float, max_scale: float
) -> list[Direction]:
    """eps = -rho v / ||v||_F min(1 / gbar, max_scale), v = s (mB A + B mA), of every pair as a product of rank 2 r.

    m are the optimizer's first moments as they are, without bias correction, gbar the moving averages of ||g||_F.
    eps = 0 where ||v||_F <= 1e-12.
    """
    momenta = [tuple(optimizer.state[p]["exp_avg"].flatten(1) for p in (pair.a, pair.b)) for pair in pairs]

    def factor(a: Tensor, b: Tensor, m_a: Tensor, m_b: Tensor, s: Tensor, gbar: Tensor) -> tuple[Tensor]:
        size = s.abs() * row_squares(torch.cat((m_b, b), dim=2), torch.cat((a, m_a), dim=1)).sum(1).sqrt()
        scale = (1.0 / (gbar + _TINY)).clamp_max(max_scale)
        return (torch.where(size > _TINY, -rho * s * scale / (size + _TINY), 0.0),)

    items = [(*item, gbar) for item, gbar in zip(_items(pairs, momenta), grad_norms, strict=True)]
    return [
        Direction(torch.cat((pair.down, m_a)), torch.cat((m_b, pair.up), dim=1) * c)
        for pair, (m_a, m_b), (c,) in zip(pairs, momenta, in_stacks(factor, items), strict=True)
    ]


def _items(pairs: Sequence[LowRankPair], others: Sequence[Any]) -> list[tuple[Tensor, ...]]:
    """(A, B, two tensors shaped like them, s) of every pair."""
    return [
        (pair.down, pair.up, *other, pair.down.new_full((), pair.scaling))
        for pair, other in zip(pairs, others, strict=True)
    ]
