"""Directions on which rank-one pairs start again: kept from the start, or sketched while training (see `sketch`).

RA (k, in), RB (out, k) are k pairs that wait, in the order of their use. For the gradient's directions there are none;
the sketch Z (r + 4, in) of the weight's gradient is gathered in the backward passes of the last steps before an event,
and new pairs start at (a, 0) with orthogonal rows a of its leading row space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loratlas.engine import sketch
from loratlas.engine.method import View
from loratlas.engine.sharded import averaged, several_ranks, whole

BUFFERS = ("RA", "RB", "sketch")
GROWING = ("RA", "RB")
LORA_LENGTH = 3**-0.5  # of a row of A as LoRA draws it, in the root mean square


def shapes(r: int, spare: int, n_in: int, n_out: int, *, sketched: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the buffers for `spare` pairs that wait, or for a sketch."""
    if sketched:
        return {"RA": (0, n_in), "RB": (n_out, 0), "sketch": (r + sketch.OVERSAMPLING, n_in)}
    return {"RA": (spare, n_in), "RB": (n_out, spare)}


def keep(t: View, down: Tensor, up: Tensor) -> None:
    """Let the pairs of down (k, in) and up (out, k) wait."""
    t.grow("RA", down.to(t.RA).clone())
    t.grow("RB", up.to(t.RB).clone())


def take(t: View, count: int) -> tuple[Tensor, Tensor]:
    """(down, up) of the next `count` pairs that wait; they are gone then."""
    down, up = t.RA[:count].to(t.A.device), t.RB[:, :count].to(t.B.device)
    keep(t, t.RA[count:], t.RB[:, count:])
    return down, up


def watch(draws: Sequence[tuple[View, int | None]]) -> None:
    """Let layers gather in the backward passes to come, each with the probe of this number; None: let it not.

    A probe is drawn once for all layers of a size and stays until `sketched`. It is a derived tensor: never saved,
    drawn again from its number by a run that goes on.
    """
    drawn: dict[tuple[Any, ...], Tensor] = {}
    for t, number in draws:
        if number is None:
            forget(t)
        elif t.probe is None:
            of = number, t.op.shape[0], len(t.sketch), t.sketch.device
            if of not in drawn:
                drawn[of] = sketch.probe(*of[:3], like=t.sketch)
            t.layer.store("probe")[t.adapter] = drawn[of]


def share(views: Sequence[View]) -> None:
    """Let all ranks have the mean of what they have gathered; call it after every step that gathers.

    Not at the event alone: DistributedDataParallel overwrites buffers with those of rank 0 in the next forward, and a
    checkpoint has one rank's.
    """
    gathered = [t.sketch for t in views if t.probe is not None]
    if gathered and several_ranks():
        means = averaged(torch.cat([own.flatten() for own in gathered])).split([own.numel() for own in gathered])
        for own, mean in zip(gathered, means, strict=True):
            own.copy_(mean.view_as(own))


def forget(t: View) -> None:
    """Take the layer's probe away."""
    if t.probe is not None:
        del t.layer.store("probe")[t.adapter]


def sketched(t: View, slots: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """(down, up) of new pairs for `slots` (k,) from the sketch, which is emptied; length: of the rows of down."""
    stays = torch.ones(len(t.A), dtype=torch.bool, device=slots.device).index_fill_(0, slots, False)
    rows = sketch.directions(t.sketch, len(slots), whole(t.A)[stays])
    t.sketch.zero_()
    forget(t)
    return rows * length, torch.zeros_like(whole(t.B)[:, slots])
