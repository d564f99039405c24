"""Which positions of a batch of logits have a label, and their logits as a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loratlas.engine.relative_fisher import IGNORED
from loratlas.errors import UserError


def labels_of(inputs: Mapping[str, Any], who: str) -> Tensor:
    """The labels of a batch.

    Raises:
        UserError: it has none.
    """
    labels = inputs.get("labels")
    if labels is None:
        raise UserError(f"{who} needs to know which tokens are trained on: give every batch its labels.")
    return labels


def labelled(logits: Tensor, labels: Tensor, who: str, *, shift: bool) -> Tensor:
    """The logits at positions with a label, (n, V), in the order of `targets`.

    Args:
        logits: (B, T, V).
        labels: (B, T); -100 is no label.
        who: names the objective in errors.
        shift: take position t - 1, which predicts label t, as a causal model's own loss does; False: position t itself.

    Raises:
        UserError: shapes that do not go together, or no label at all.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise UserError(
            f"{who} needs logits of shape (batch, tokens, vocabulary) and labels of shape (batch, tokens), but they "
            f"are {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    mask = (labels[:, 1:] if shift else labels) != IGNORED
    rows = (logits[:, :-1] if shift else logits)[mask]
    if rows.shape[0] == 0:
        raise UserError(
            f"{who}: no token of a batch has a label, all are {IGNORED}: does truncation cut the answers off?"
        )
    return rows


def targets(labels: Tensor) -> Tensor:
    """The labels that `labelled(shift=True)` gives the predicting logits of, (n,)."""
    later = labels[:, 1:]
    return later[later != IGNORED]
