"""The fused low-rank linear op: y = x W^T + b + (d(x) D^T) U^T in one autograd node.

    D = [down; frozen_down]  (k + f, in)      U = [up, frozen_up]  (out, k + f)      d: dropout

Backward, with g = dL/dy and h = d(x) D^T:

    dL/dx    = g W + d'(g U D)          dL/ddown = (g U)[:, :k]^T d(x)
    dL/db    = sum g                    dL/dup   = g^T h[:, :k]

Saved for backward: x in its own dtype (shared by q, k and v), h[:, :k] and, with dropout, the mask as one byte an
element. There is no dropped copy of x, no copy of x in another dtype, and the frozen part gets no gradient. The
factors come in the adapter's dtype (fp32) and are cast once, after any difference of theirs has been taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from loratlas.engine.method import Factors


def can_fuse(base: nn.Module) -> bool:
    """Whether `base` is a plain dense layer whose forward is exactly x W^T + b with a frozen W.

    Quantised and sharded weights are tensor subclasses, accelerate and users hang hooks on modules, and under
    torch.compile the plain formula lets the compiler see through: all of these take `Method.delta` instead.
    """
    if type(base) not in (nn.Linear, Conv1D) or torch.compiler.is_compiling() or has_hooks(base):
        return False
    weight = base.weight
    return type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad


def has_hooks(base: nn.Module) -> bool:
    """Whether somebody watches or steers the forward of `base`, which then has to be called."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks) or hasattr(base, "_hf_hook")


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: float = 0.0) -> Tensor:
    """x: (..., in); weight: (out, in), frozen; returns (..., out) in x's dtype, or in autocast's where that is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # autocast would do this cast inside F.linear (not for fp64); done here it happens once for both products
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if bias is not None:
            bias = bias.to(x.dtype)
        return _FusedLinear.apply(x, weight.to(x.dtype), bias, *factors, dropout)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        frozen_down: Tensor | None,
        frozen_up: Tensor | None,
        dropout: float,
    ) -> Tensor:
        live = down.shape[0]
        all_down, all_up = (m.to(x.dtype) for m in Factors(down, up, frozen_down, frozen_up).joined())
        rows = x.reshape(-1, x.shape[-1])
        keep = None
        if dropout > 0.0:
            keep = torch.empty(rows.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout)
            # the factor 1 / (1 - p) goes into the narrow product instead of a second pass over x
            hidden = ((rows * keep) @ all_down.T).div_(1.0 - dropout)
        else:
            hidden = rows @ all_down.T
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(hidden, all_up.T)

        ctx.save_for_backward(x, weight, all_down, all_up, hidden[:, :live].contiguous(), keep)
        ctx.dropout = dropout
        ctx.factor_dtypes = (down.dtype, up.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, all_down, all_up, hidden, keep = ctx.saved_tensors
        live = hidden.shape[1]
        g = grads[0].reshape(-1, grads[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        want_x, _, want_bias, want_down, want_up = ctx.needs_input_grad[:5]

        narrow = g @ all_up
        if keep is not None:
            narrow = narrow.div_(1.0 - ctx.dropout)
        d_x = d_bias = d_down = d_up = None
        if want_x:
            d_rows = g @ weight
            if keep is None:
                d_rows.addmm_(narrow, all_down)
            else:
                d_rows.addcmul_(narrow @ all_down, keep.to(d_rows.dtype))
            d_x = d_rows.view_as(x)
        if want_down:
            d_down = (narrow[:, :live].T @ (rows if keep is None else rows * keep)).to(ctx.factor_dtypes[0])
        if want_up:
            d_up = (g.T @ hidden).to(ctx.factor_dtypes[1])
        if want_bias:
            d_bias = g.sum(0).to(ctx.bias_dtype)
        return d_x, None, d_bias, d_down, d_up, None, None, None
