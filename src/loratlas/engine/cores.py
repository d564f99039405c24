"""Methods with three factors: a small square core N between two thin ones.

    delta = s B N A,      A (r, in),   N (r, r),   B (out, r)

A method trains all of them, or fixes A and B and trains the r x r core alone. One that starts away from zero without
changing the function keeps where its trained factors started, A0, N0, B0, and evaluates the difference

    delta = s (B N A - B0 N0 A0) = s [M, B0 N0] [A; A - A0],      M = (B - B0) N + B0 (N - N0),

which is exactly 0 at the start in any dtype and has the gradients of s B N A. A fixed A is its own start, so that the
second half vanishes and the update keeps rank r. The core is multiplied into B (O(out r^2)): the input of the layer
then meets A alone, and where A is fixed the backward pass does not need that input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.sharded import refuse_cast

TENSORS: tuple[str, ...] = ("A", "N", "B")
STARTS: tuple[str, ...] = ("A0", "N0", "B0")


class CoreMethod(LowRankMethod):
    """Subclasses say in `params` and `buffers` which factors train, and call `start` in `place`."""

    kinds = ("linear", "conv1d", "conv2d")
    params = TENSORS
    buffers = STARTS

    def keeps_start(self, cfg: Any) -> bool:
        """Whether this config starts away from zero and takes its start out of the update."""
        return False

    def shapes(self, cfg: Any, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        own: dict[str, tuple[int, ...]] = {"A": (r, n_in), "N": (r, r), "B": (n_out, r)}
        moving = [name for name in self.params if name not in self.frozen(cfg)] if self.keeps_start(cfg) else []
        return {**own, **{f"{name}0": own[name] for name in moving}}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        if t.r > min(t.op.shape):
            return min(t.op.shape)
        if t.cfg.init_weights is False:
            random_start(t, identity=False)
            return None
        return self.place(t, weight)

    def place(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        """`init` with the method's own start, for t.r <= min(out, in)."""
        raise NotImplementedError

    def live_up(self, t: View) -> Tensor:
        """B as the forward sees it; a method that stops the gradient of parts of it does that here."""
        return t.B

    def factors(self, t: View) -> Factors:
        kept_core = kept_start(t, "N")
        refuse_cast(t.N, t.A if kept_core is None else kept_core)
        with torch.autocast(t.N.device.type, enabled=False):
            up = self.live_up(t)
            if kept_core is None:
                return Factors(t.A, up @ _scaled(t.N, t.scaling))
            kept_down, kept_up = kept_start(t, "A"), kept_start(t, "B")
            fixed = up if kept_up is None else kept_up
            # differences of factors, not of products: these are exact zeros at the start whatever the matrix kernels do
            moved = fixed @ _scaled(t.N - kept_core, t.scaling)
            if kept_up is not None:
                moved = moved + (up - kept_up) @ _scaled(t.N, t.scaling)
            if kept_down is None:
                return Factors(t.A, moved)
            product = fixed @ _scaled(kept_core, t.scaling)
            return Factors(torch.cat((t.A, t.A - kept_down)), torch.cat((moved, product), dim=1))


def start(t: View, up: Tensor, core: Tensor, down: Tensor) -> None:
    """Let the factors start at B = up (out, r), N = core (r, r), A = down (r, in)."""
    for name, value in (("A", down), ("N", core), ("B", up)):
        getattr(t, name).copy_(value)
        kept = kept_start(t, name)
        if kept is not None:
            kept.copy_(value)


def kept_start(t: View, name: str) -> Tensor | None:
    """Where factor `name` started; None if the update is not a difference, or if the factor does not train."""
    return getattr(t, f"{name}0") if f"{name}0" in t.layer.method.buffers else None


def random_start(t: View, *, identity: bool) -> None:
    """LoRA's start with a core, from torch's global generator: uniform within 1 / sqrt(fan in), B = 0 with `identity`.

    Where a factor started is not kept: the update is s B N A.
    """
    for factor in (t.A, t.N) if identity else (t.A, t.N, t.B):
        nn.init.kaiming_uniform_(factor, a=5**0.5)


def _scaled(factor: Tensor, scaling: float) -> Tensor:
    return factor if scaling == 1.0 else factor * scaling
