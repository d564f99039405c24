"""LoKU: unlearning by an inverted hinge loss beside ordinary training on what to keep (arXiv 2408.06621, code read).

    IHL  = mean_t max(0, margin + p_t(y_t) - max_{v != y_t} p_t(v)),   p = softmax of the logits     forget tokens
    L    = L_forget + retain_weight * L_retain                                         retain tokens: cross entropy

Gradient ascent pushes the target's probability down for ever and spreads what it takes over the whole vocabulary. IHL
lies in [0, 2], pushes only the target down and the runner-up up, and stops by itself:

    d IHL / d z = p_y (e_y - p) - p_v (e_v - p)                                          v: the runner-up

A batch holds rows of both sets and the key "forget", one boolean a row, which `pairing` makes; one forward serves both.
The start that goes with it is `AtlasLoraConfig(init_weights="fila")`. It is no guarantee that something is erased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratlas.engine.config import knob
from loratlas.engine.parts import Objective, ObjectiveConfig
from loratlas.errors import UserError
from loratlas.objectives.tokens import labelled, labels_of, targets

FORGET = "forget"  # key of a batch: which rows are to be forgotten
LOSSES = ("ihl", "ascent")


def inverted_hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """mean_t max(0, margin + p(y) - max_{v != y} p(v)), in [margin - 1, margin + 1].

    Args:
        logits: (B, T, V), of which position t - 1 predicts label t.
        labels: (B, T); -100 does not count.

    Raises:
        UserError: no label that counts, a vocabulary of one, shapes that do not go together.
    """
    rows = labelled(logits, labels, "the inverted hinge loss", shift=True)
    if rows.shape[1] < 2:
        raise UserError("the inverted hinge loss compares a token with the next likely one: it needs two or more.")
    p = rows.float().softmax(-1)
    target = targets(labels)[:, None]
    runner_up = p.scatter(1, target, -torch.inf).max(1).values  # max: one index has the gradient, also among ties
    return (margin + p.gather(1, target).squeeze(1) - runner_up).clamp_min(0.0).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labels that count, as a causal model's own loss; arguments as `inverted_hinge`."""
    return F.cross_entropy(labelled(logits, labels, "unlearning", shift=True).float(), targets(labels))


def ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient ascent: minus the cross entropy, which has no lower bound."""
    return -cross_entropy(logits, labels)


class LoKU(Objective):
    """The objective of `LoKUConfig.build`. `terms`: "forget" and "retain"."""

    own = (FORGET,)

    def __init__(self, forget_loss: Callable[[Tensor, Tensor], Tensor], retain_weight: float) -> None:
        super().__init__()
        self.forget_loss, self.retain_weight = forget_loss, retain_weight

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The loss of the rows to forget plus retain_weight times that of the others; `outputs.loss` is not used.

        Raises:
            UserError: the batch does not say which rows to forget, has none of either set, or one of them no label.
        """
        labels, forget = labels_of(inputs, "unlearning"), _rows(inputs, self.retain_weight > 0.0)
        loss = self.forget_loss(outputs.logits[forget], labels[forget])
        self.terms = {"forget": loss.detach()}
        if self.retain_weight > 0.0:
            retain = cross_entropy(outputs.logits[~forget], labels[~forget])
            self.terms["retain"] = retain.detach()
            loss = loss + self.retain_weight * retain
        return loss


def _rows(inputs: Mapping[str, Any], both: bool) -> Tensor:
    forget = inputs.get(FORGET)
    if forget is None:
        raise UserError(
            f"the batch does not say which rows to forget: give it the key {FORGET!r}, one boolean a row, as "
            "PairCollator does (in a Trainer with remove_unused_columns=False)."
        )
    forget = forget.bool()
    if not bool(forget.any()):
        raise UserError("the batch has no row to forget: every batch needs some of the forget set.")
    if both and bool(forget.all()):
        raise UserError("the batch has no row to retain: add some of the retain set, or set retain_weight=0.")
    return forget


@dataclass
class LoKUConfig(ObjectiveConfig):
    """Unlearning: a forget set against a retain set, in batches of both (see `pairing`).

    | | forget_loss | retain_weight |
    |---|---|---|
    | LoKU | "ihl" | 1 |
    | GradDiff | "ascent" | 1 |
    | gradient ascent | "ascent" | 0 |

    Raises:
        UserError: a field is out of its range.
    """

    name: ClassVar[str] = "loku"
    sets: ClassVar[tuple[str, ...]] = (FORGET,)

    forget_loss: str = knob("ihl", "'ihl': the inverted hinge loss. 'ascent': minus the cross entropy.")
    retain_weight: float = knob(1.0, "Weight of the cross entropy on the retain set; 0: the forget set alone.")
    margin: float = knob(1.0, "Margin of 'ihl'. Below 1 tokens stop counting when the runner-up leads by it.")

    def __post_init__(self) -> None:
        self._require(self.forget_loss in LOSSES, "forget_loss", "'ihl' or 'ascent'")
        self._require(self.retain_weight >= 0, "retain_weight", "at least 0")
        self._require(self.margin > 0, "margin", "positive")

    def build(self, model: nn.Module) -> LoKU:
        forget_loss = partial(inverted_hinge, margin=self.margin) if self.forget_loss == "ihl" else ascent
        return LoKU(forget_loss, self.retain_weight)
