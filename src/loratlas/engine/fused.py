"""The fused low-rank linear op: y = x W^T + b + (d(x) D^T) U in one autograd node.

    D = [A; A - A*; F_down]  (k, in)      U = [B - B*, B*, F_up]^T  (k, out)      d: dropout

with A, B the live factors, A*, B* their starts and F the frozen part; without starts D = [A; F_down] and so on.
Backward, with g = dL/dy, n = g U^T and h = d(x) A^T:

    dL/dx = g W + d'(n D)      dL/dA = (n_1 + n_2)^T d(x)      dL/dB = g^T h      dL/db = sum g

where n_1 and n_2 are the columns of A and of A - A*. With a row scale c (see `Factors`), dL/dB = (c g)^T h and n in
dL/dA is (c g) U^T; dL/dx is as it was. Saved for backward: x in its own dtype (shared by q, k and v) if
A trains, h, which is as narrow as A, and, with dropout, one bit an element of x. There is no dropped copy of x and no
copy of x in another dtype. A probe P with its sketch (see `Factors`) rides along: g [U^T, P] is one product, and so is
[n_1 + n_2, g P]^T d(x). The factors come in the adapter's dtype (fp32): differences are taken there, then each is
cast once. U is laid out with long rows, because all products with it are then 1.3 to 3 times as fast on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratlas.engine import bitmask
from loratlas.engine.factors import Factors
from loratlas.errors import UserError

log = logging.getLogger(__name__)
_SAID: set[str] = set()


def can_fuse(base: nn.Module) -> bool:
    """Whether `base` is a plain dense layer whose forward is exactly x W^T + b with a frozen W.

    Where it is not, `Method.delta` gives the same result by the plain formula. Why that is so is logged, once for each
    reason.
    """
    if isinstance(base, (nn.Conv2d, nn.Embedding)):
        return False  # kinds that the op does not know; nobody expects it there
    reason = _obstacle(base)
    if reason is not None:
        _say_once(reason)
    return reason is None


def has_hooks(base: nn.Module) -> bool:
    """Whether somebody watches or steers the forward of `base`, which then has to be called."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks) or hasattr(base, "_hf_hook")


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, dropout: float = 0.0) -> Tensor:
    """x: (..., in); weight: (out, in), frozen; returns (..., out) in x's dtype, or in autocast's where that is on.

    Raises:
        UserError: a second derivative is asked for.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # autocast would do this cast inside F.linear (not for fp64); done here it happens once for both products
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if bias is not None:
            bias = bias.to(x.dtype)
        return _FusedLinear.apply(x, weight.to(x.dtype), bias, dropout, *factors)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float, *parts: Tensor | None
    ) -> Tensor:
        factors = Factors(*parts)  # type: ignore[arg-type]
        downs, ups = factors.blocks()
        all_down, all_up = _stacked(downs, x.dtype), _stacked([up.T for up in ups], x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        bits = None
        if dropout > 0.0:
            bits, ctx.stays = bitmask.draw(rows.numel(), dropout, x.device)
            # the factor 1 / (1 - p) goes into the narrow product instead of a second pass over x
            hidden = (bitmask.unpack(bits, rows).mul_(rows) @ all_down.T).div_(ctx.stays)
        else:
            hidden = rows @ all_down.T
        y = F.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(hidden, all_up)

        live = factors.down.shape[0]
        kept_x = x if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(kept_x, weight, all_down, all_up, hidden[:, :live].contiguous(), bits)
        ctx.shape = x.shape
        ctx.has_start = factors.start_down is not None
        ctx.row_scale, ctx.observe = factors.row_scale, factors.observe
        ctx.probe, ctx.sketch = factors.probe, factors.sketch
        ctx.dtypes = (factors.down.dtype, factors.up.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            x, weight, all_down, all_up, hidden, bits = ctx.saved_tensors
            want_x, _, want_bias, _, want_down, want_up = ctx.needs_input_grad[:6]
            g = grads[0].reshape(-1, grads[0].shape[-1])
            keep = None if bits is None else bitmask.unpack(bits, g.new_empty((len(g), ctx.shape[-1])))
            probed = want_down and ctx.probe is not None
            narrow = g @ (torch.cat((all_up, ctx.probe.T.to(g))) if probed else all_up).T
            if keep is not None:
                narrow.div_(ctx.stays)
            if probed:
                narrow, seen = narrow.split((len(all_up), ctx.probe.shape[1]), dim=1)
            d_x = d_bias = d_down = d_up = None
            r = hidden.shape[1]
            live = narrow
            if ctx.row_scale is not None and want_down:
                scale = ctx.row_scale.to(g.dtype)
                live = g @ (all_up[: 2 * r if ctx.has_start else r] * scale).T
                if keep is not None:
                    live.div_(ctx.stays)
            if want_x:
                d_rows = narrow @ all_down
                if keep is not None:
                    d_rows.mul_(keep)
                d_x = d_rows.addmm_(g, weight).view(ctx.shape)
            if want_down:
                rows = x.reshape(-1, x.shape[-1])
                rows = rows if keep is None else keep.mul_(rows)
                of_a = live[:, :r] + live[:, r : 2 * r] if ctx.has_start else live[:, :r]
                d_down = (torch.cat((of_a, seen), dim=1) if probed else of_a).T @ rows
                if probed:
                    d_down, found = d_down.split((r, ctx.probe.shape[1]))
                    ctx.sketch.add_(found)
                d_down = d_down.to(ctx.dtypes[0])
                if ctx.observe is not None:
                    ctx.observe(g, rows if keep is None else rows.div_(ctx.stays))
            if want_up:
                d_up = (hidden.T @ g).T.to(ctx.dtypes[1])
                if ctx.row_scale is not None:
                    d_up.mul_(ctx.row_scale.to(d_up.dtype)[:, None])
            if want_bias:
                d_bias = g.sum(0).to(ctx.dtypes[2])
        made = (d_x, None, d_bias, None, d_down, d_up, *[None] * (len(Factors._fields) - 2))
        return _once(made) if torch.is_grad_enabled() else made


def _stacked(blocks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The blocks (k_i, n) below one another, contiguous, each cast as it is copied; one that fits is not copied."""
    if len(blocks) == 1:
        return blocks[0].to(dtype).contiguous()
    heights = [block.shape[0] for block in blocks]
    stacked = blocks[0].new_empty((sum(heights), blocks[0].shape[1]), dtype=dtype)
    for piece, block in zip(stacked.split(heights), blocks, strict=True):
        piece.copy_(block)
    return stacked


class _Once(torch.autograd.Function):
    """Passes gradients on; theirs are refused."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise UserError(
            "the fused low-rank op has no second derivative: take it with torch.func (grad, jvp, hessian), under which "
            "adapters use the plain formula."
        )


def _once(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as results of a node, so that differentiating them fails instead of silently giving zero."""
    anchor = torch.empty(0, requires_grad=True)  # makes autograd record the node
    marked = iter(_Once.apply(anchor, *(grad for grad in grads if grad is not None)))
    return tuple(None if grad is None else next(marked) for grad in grads)


def _obstacle(base: nn.Module) -> str | None:
    """Why the op cannot stand in for the call of `base`; None if it can."""
    if torch.compiler.is_compiling():
        return "under torch.compile the compiler sees through the plain formula"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the plain formula"
    if type(base) not in (nn.Linear, Conv1D):
        return f"a base layer is a {type(base).__name__}, not a dense linear layer"
    if has_hooks(base):
        return "a base layer has hooks of its own (accelerate's offloading, or yours)"
    if type(base.weight) not in (nn.Parameter, Tensor):
        return f"the weight of a base layer is a {type(base.weight).__name__}"
    if base.weight.requires_grad:
        return "the weight of a base layer trains too"
    return None


@torch.compiler.assume_constant_result  # runs while torch.compile traces, instead of breaking its graph
def _say_once(reason: str) -> None:
    if reason not in _SAID:
        _SAID.add(reason)
        log.warning("%s: adapters take the plain formula there, not the fused op (same result, more memory).", reason)
