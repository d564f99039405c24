"""The linear op of a low-rank plus a sparse matrix, D = B A + S, of which nothing dense is kept.

    y = x (W + D)^T + b        S has the values v at `support`, flat positions o * in + i in rising order

D is built in the forward and again in the backward pass, and G = dL/dD = g^T x lives only there:

    dL/dx = g (W + D)      dL/dB = G A^T      dL/dA = B^T G      dL/dv = G[support]      dL/db = sum g

The products cost as much as those of a dense layer: what is saved is memory. W may be absent. In half precision it is
not added to D, which would be lost in it, but multiplied apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_HALF = (torch.float16, torch.bfloat16)


def draw_support(seed: int, n_out: int, n_in: int, count: int) -> Tensor:
    """`count` different positions of an (out, in) matrix, drawn without replacement, rising; int32 where that holds."""
    chosen = np.random.default_rng(seed).choice(n_out * n_in, size=count, replace=False, shuffle=False)
    dtype = torch.int32 if n_out * n_in < 2**31 else torch.int64
    return torch.from_numpy(np.sort(chosen)).to(dtype)


def dense(up: Tensor, down: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """D = up @ down + S, (out, in)."""
    product = up @ down
    return product.reshape(-1).index_add(0, support, values).view_as(product)


def sparse_low_rank_linear(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    values: Tensor,
    support: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x (..., in) to (..., out), in x's dtype or in autocast's where that is on; up (out, r), down (r, in), values and
    support (nnz,), weight (out, in) frozen."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        weight, bias = (None if tensor is None else tensor.to(x.dtype) for tensor in (weight, bias))
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return _linear(x, _matrix(x, up, down, values, support, weight), weight, bias)
        return _SparseLowRank.apply(x, up, down, values, support, weight, bias)


def _matrix(x: Tensor, up: Tensor, down: Tensor, values: Tensor, support: Tensor, weight: Tensor | None) -> Tensor:
    made = dense(up, down, values, support).to(x.dtype)
    return made if weight is None or x.dtype in _HALF else made + weight


def _linear(x: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None or x.dtype not in _HALF:
        return F.linear(x, matrix, bias)
    return F.linear(x, weight, bias) + F.linear(x, matrix)


class _SparseLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, values: Tensor, support: Tensor, *fixed: Any) -> Tensor:
        weight, bias = fixed
        ctx.save_for_backward(x, up, down, values, support, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, _matrix(x, up, down, values, support, weight), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, values, support, weight = ctx.saved_tensors
        rows, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        d_x = d_up = d_down = d_values = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = g @ _matrix(x, up, down, values, support, weight)
            if weight is not None and x.dtype in _HALF:
                d_x = d_x + g @ weight
        if any(ctx.needs_input_grad[1:4]):
            full = (g2.T @ rows).to(up.dtype)
            d_up, d_down = full @ down.T, up.T @ full
            d_values = full.reshape(-1)[support]
        if ctx.needs_input_grad[6]:
            d_bias = g2.sum(0).to(ctx.bias_dtype)
        return d_x, d_up, d_down, d_values, None, None, d_bias
