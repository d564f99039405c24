"""A weight update as thin factors, and its branch of the forward by the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loratlas.engine.ops import Op


class Factors(NamedTuple):
    """A weight update in low-rank form, scaling folded in; F is the frozen part.

        delta = up @ down + F_up @ F_down                             without a start
        delta = up @ down - start_up @ start_down + F_up @ F_down     with one, evaluated as
              = [up - start_up, start_up] @ [down; down - start_down] + F_up @ F_down

    down: (k, in) and up: (out, k) carry gradients to the method's parameters; frozen_down: (f, in), frozen_up:
    (out, f), start_down: (k, in) and start_up: (out, k) do not. All in the adapter's dtype, in which the differences
    are taken: in bf16 the difference of two close factors would be noise.

    Three things concern the backward pass alone, where g (tokens, out) is the gradient of the layer's output and x
    (tokens, in) the input of the branch, after dropout:

        row_scale: (out,), no gradient; down and up get their gradients from g * row_scale, x gets its own from g.
        observe: called with (g, x), for what a method wants to know of dL/dW = g^T x without having it as a whole. It
            runs once a backward pass and must not change either.
        probe, sketch: (out, k), (k, in): (g probe)^T x is added to `sketch`, in the same passes over g and x in which
            the factors get their gradients.
    """

    down: Tensor
    up: Tensor
    frozen_down: Tensor | None = None
    frozen_up: Tensor | None = None
    start_down: Tensor | None = None
    start_up: Tensor | None = None
    row_scale: Tensor | None = None
    observe: Callable[[Tensor, Tensor], None] | None = None
    probe: Tensor | None = None
    sketch: Tensor | None = None

    def blocks(self) -> tuple[list[Tensor], list[Tensor]]:
        """(downs, ups): the update is the sum of up @ down over both lists."""
        downs, ups = [self.down], [self.up]
        if self.start_down is not None and self.start_up is not None:
            downs, ups = [self.down, self.down - self.start_down], [self.up - self.start_up, self.start_up]
        if self.frozen_down is not None and self.frozen_up is not None:
            downs.append(self.frozen_down)
            ups.append(self.frozen_up)
        return downs, ups

    def observers(self) -> list[Callable[[Tensor, Tensor], None]]:
        """What looks at (g, x) in the backward pass: `observe`, and the sketch by its plain formula."""
        watching = [] if self.observe is None else [self.observe]
        if self.probe is not None and self.sketch is not None:
            watching.append(partial(accumulate, self.sketch, self.probe))
        return watching

    def joined(self) -> tuple[Tensor, Tensor]:
        """(down, up) of the whole update, all blocks beside each other."""
        downs, ups = self.blocks()
        return (downs[0], ups[0]) if len(downs) == 1 else (torch.cat(downs), torch.cat(ups, dim=1))


@torch.no_grad()
def accumulate(sketch: Tensor, probe: Tensor, g: Tensor, x: Tensor) -> None:
    """sketch += (g probe)^T x for g (tokens, out), x (tokens, in), probe (out, k); sketch: (k, in)."""
    sketch.add_(((g @ probe.to(g)).T @ x).to(sketch.dtype))


def low_rank_branch(op: Op, x: Tensor, factors: Factors) -> Tensor:
    """The branch by the plain formula, for layers that `fused` does not serve; the same gradients."""
    down, up = factors.joined()
    if factors.row_scale is None:
        y = op.low_rank(x, down, up)
    else:
        # the value is that of the first term, the second is zero: x meets unscaled gradients, the factors scaled ones
        train = op.low_rank(x.detach(), down, up)
        y = op.low_rank(x, down.detach(), up.detach()) + (op.scale_gradient(train, factors.row_scale) - train.detach())
    for watch in factors.observers() if y.requires_grad else ():
        _hook(op, x, y, watch)
    return y


def _hook(op: Op, x: Tensor, y: Tensor, watch: Callable[[Tensor, Tensor], None]) -> None:
    rows = op.rows(x.detach())
    y.register_hook(lambda g: watch(op.output_rows(g), rows))
