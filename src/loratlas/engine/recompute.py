"""A linear layer with an update of full rank, of which nothing wide is kept between forward and backward.

    y = x W^T + b + d(x) (P Q)^T      P (out, R), Q (R, in)
    y = x W^T + b + d(x) (P Q)        P (in, R),  Q (R, out): across        d: dropout

P is frozen and lies elsewhere, a view of a basis that layers share; Q = make(theta) takes little to make from a few
trained numbers theta and is made again in the backward pass. Saved are x (shared by q, k and v), or across the narrower
h = d(x) P, and with dropout one bit an element of x. With g = dL/dy and n = g P:

    dL/dx = g W + d'(n Q)             dL/dQ = n^T d(x)  or, where that is cheaper without dropout,  P^T (g^T x)
    dL/dx = g W + d'((g Q^T) P^T)     dL/dQ = h^T g: across

and dL/dtheta by differentiating `make`. R is about the smaller side of the layer, so that the two products of the
branch cost as much as the one with W, or more. In fp32 and fp64, with enough rows in x, it is cheaper to form W + P Q:

    y = x (W + P Q)^T + b             dL/dx = g (W + P Q)

In half precision the sum of W and a small update would be W, so there the products stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratlas.engine import bitmask


def recomputed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    basis: Tensor,
    make: Callable[..., Tensor],
    *theta: Tensor,
    across: bool,
    dropout: float = 0.0,
) -> Tensor:
    """x: (..., in) to (..., out), in x's dtype or in autocast's where that is on; without `weight` the branch alone.

    weight: (out, in), frozen. basis: P, frozen. make: Q of theta, differentiable and without a state.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        weight, bias = (None if tensor is None else tensor.to(x.dtype) for tensor in (weight, bias))
        return _Recomputed.apply(x, weight, bias, basis, make, across, dropout, *theta)


def transformed() -> bool:
    """Whether torch.compile or torch.func looks on, both of which want the plain formula."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        basis: Tensor,
        make: Callable[..., Tensor],
        across: bool,
        dropout: float,
        *theta: Tensor,
    ) -> Tensor:
        rows, trains = x.reshape(-1, x.shape[-1]), any(ctx.needs_input_grad[7:])
        down, up = _factors(basis, make(*theta), across, x.dtype)
        exact = dropout == 0.0 and weight is not None and weight.dtype in (torch.float32, torch.float64)
        kept_narrow = across and trains
        summed = exact and _sum_is_cheaper(len(rows), down, up, beside=kept_narrow)
        bits, stays = None, 1.0
        narrow: Any = None
        if dropout > 0.0:
            bits, stays = bitmask.draw(rows.numel(), dropout, x.device)
            narrow = (bitmask.unpack(bits, rows).mul_(rows) @ down).div_(stays)
        elif kept_narrow or not summed:
            narrow = rows @ down
        if summed:
            y = F.linear(rows, _sum(weight, down, up), bias)
        else:
            y = narrow @ up if weight is None else F.linear(rows, weight, bias).addmm_(narrow, up)
        kept = narrow if kept_narrow else x if trains else None
        ctx.save_for_backward(kept, weight, basis, bits, *theta)
        ctx.make, ctx.across, ctx.exact, ctx.stays, ctx.shape = make, across, exact, stays, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, basis, bits, *theta = ctx.saved_tensors
        wanted = ctx.needs_input_grad[7:]
        g = grad.reshape(-1, grad.shape[-1])
        trained = [t.detach().requires_grad_(want) for t, want in zip(theta, wanted, strict=True)]
        with torch.enable_grad():
            made = ctx.make(*trained)
        down, up = _factors(basis, made.detach(), ctx.across, g.dtype)
        d_x, d_q = _gradients(ctx, g, kept, weight, down, up, bits)
        found: Iterator[Tensor] = iter(())
        if d_q is not None:
            live = [t for t in trained if t.requires_grad]
            found = iter(torch.autograd.grad(made, live, d_q.to(made.dtype)))
        d_theta = [next(found) if want else None for want in wanted]
        d_bias = g.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return (None if d_x is None else d_x.view(ctx.shape), None, d_bias, None, None, None, None, *d_theta)


def _gradients(
    ctx: Any, g: Tensor, kept: Tensor | None, weight: Tensor | None, down: Tensor, up: Tensor, bits: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(dL/dx, dL/dQ), None where it is not wanted."""
    want_x = ctx.needs_input_grad[0]
    rows = None if kept is None else kept.reshape(-1, kept.shape[-1])
    keep = None if bits is None else bitmask.unpack(bits, g.new_empty((len(g), ctx.shape[-1])))
    of_down = rows is not None and not ctx.across
    wide = of_down and ctx.exact and _wide_gradient_is_cheaper(len(g), down, up)
    summed = ctx.exact and (wide or _sum_is_cheaper(len(g), up.T, down.T, beside=of_down))
    narrow: Any = g @ up.T if (of_down and not wide) or (want_x and not summed) else None
    if narrow is not None and keep is not None:
        narrow.div_(ctx.stays)
    d_x: Any = None
    d_q = None
    if want_x and summed:
        d_x = g @ _sum(weight, down, up)
    elif want_x:
        d_x = narrow @ down.T
        d_x = d_x if keep is None else d_x.mul_(keep)
        d_x = d_x if weight is None else d_x.addmm_(g, weight)
    if rows is not None and ctx.across:
        d_q = rows.T @ g
    elif rows is not None and wide:
        d_q = up @ (g.T @ rows)
    elif rows is not None:
        d_q = narrow.T @ (rows if keep is None else keep.mul_(rows))
    return d_x, d_q


def _factors(basis: Tensor, made: Tensor, across: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) of the branch d(x) down up, (in, R) and (R, out)."""
    p, q = basis.to(dtype), made.to(dtype)
    return (p, q) if across else (q.T, p.T)


def _sum(weight: Any, down: Tensor, up: Tensor) -> Tensor:
    return torch.addmm(weight, up.T, down.T)


# Both rules compare numbers of multiplications, n rows of x at rank R.


def _sum_is_cheaper(n: int, first: Tensor, second: Tensor, *, beside: bool) -> bool:
    """Whether first @ second, (a, R) and (R, b), takes less than x first, unless `beside` makes it, times second."""
    a, b = first.shape[0], second.shape[1]
    return a * b < n * (b if beside else a + b)


def _wide_gradient_is_cheaper(n: int, down: Tensor, up: Tensor) -> bool:
    """Whether P^T (g^T x) and g (W + P Q) take less than (g P)^T x and the cheaper way to dL/dx."""
    (n_in, rank), n_out = down.shape, up.shape[1]
    area = n_in * n_out
    return n * area + 2 * area * rank < n * rank * (n_in + n_out) + rank * min(area, n * n_in)
