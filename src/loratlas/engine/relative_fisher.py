"""What matters to one data set and not to another: the relative Fisher information of the target layers' weights.

    F = (1 / sum_b c_b) sum_b c_b g_b^2        g_b: gradient of batch b's mean loss, c_b: its labels that count
    I = F_forget / (eps + F_retain)            elementwise, (out, in)

g_b^2 is the square of a batch's mean gradient, as in the official code of LoKU (arXiv 2408.06621). That is smaller than
the mean of the samples' squares, the Fisher information proper, which `per_sample` takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loratlas.engine.calibrate import Statistics, calibrate, over_ranks
from loratlas.engine.method import RELATIVE_FISHER
from loratlas.errors import UserError

IGNORED = -100  # the label that cross entropy leaves out
Loss = Callable[[nn.Module, Any], Tensor]


def relative_fisher(
    model: nn.Module,
    config: Any,
    forget: Iterable[Mapping[str, Any]],
    retain: Iterable[Mapping[str, Any]],
    *,
    steps: int | None = None,
    eps: float = 1e-5,
    per_sample: bool = False,
    balanced: bool = False,
    loss: Loss | None = None,
) -> Statistics:
    """Gather I of the layers that `config` targets; it is returned and stored as `config.calibration`.

        config = AtlasLoraConfig(init_weights="fila", target_modules="all-linear")
        relative_fisher(model, config, forget_loader, retain_loader)
        model = get_peft_model(model, config)

    Two passes of `calibrate`, with its promises: the model is left as it was, the device holds one layer's gradient at
    a time, and all ranks of a distributed run get the same.

    Args:
        model: the base model, before `get_peft_model`.
        config: its target_modules say which layers.
        forget, retain: batches for `model(**batch)` with "labels", of which those of -100 do not count.
        steps: number of batches to use of each; None: all.
        eps: what keeps I finite where nothing of `retain` needs a weight.
        per_sample: take the samples of each batch one by one: slower, and independent of the batch size.
        balanced: scale I of every layer so that its rows weigh 1 in the mean: FILA's factors are then about as large as
            PiSSA's. Not in the paper.
        loss: (model, batch) -> the batch's mean loss, for models that return none.

    Returns:
        {module path: {"relative_fisher": (out, in)}}, on the CPU, fp32 (fp64 for fp64 models).

    Raises:
        UserError: no batch in one of the sets, a batch without labels or without one that counts; and as `calibrate`.
    """
    if eps <= 0:
        raise UserError(f"relative_fisher: eps must be positive, but it is {eps}.")
    parts = {}
    for name, batches in (("forget", forget), ("retain", retain)):
        parts[name] = _fisher(model, config, batches, name, steps, per_sample, loss)
    config.calibration = {}
    for path, found in parts["forget"].items():
        relative = found["fisher"].div_(eps + parts["retain"][path]["fisher"])
        if balanced and relative.any():
            relative /= row_weights(relative).mean().square()
        config.calibration[path] = {RELATIVE_FISHER: relative}
    return config.calibration


def row_weights(relative: Tensor) -> Tensor:
    """w_i = sqrt(sum_j I_ij), (out,): how much a row of the weight matters."""
    return relative.sum(1).sqrt()


def _fisher(
    model: nn.Module,
    config: Any,
    batches: Iterable[Mapping[str, Any]],
    name: str,
    steps: int | None,
    per_sample: bool,
    loss: Loss | None,
) -> Statistics:
    """F of one data set. A loss of sqrt(c) times the mean has c times the squared gradient."""
    total = torch.zeros(2, dtype=torch.float64)  # labels, batches

    def weighted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        count = _labels(batch, name)
        total.add_(torch.tensor([count, 1.0]))
        mean = loss(model, batch) if loss is not None else getattr(model(**batch), "loss", None)
        if mean is None:
            raise UserError("relative_fisher: the model returned no loss: pass loss=(model, batch) -> scalar.")
        return count**0.5 * mean

    source = _singly(itertools.islice(batches, steps)) if per_sample else batches
    found = calibrate(model, config, source, None if per_sample else steps, gather=("fisher",), loss=weighted)
    device = next(model.parameters()).device
    labels, seen = over_ranks(total.to(torch.float32), device).tolist()
    for statistics in found.values():
        statistics["fisher"].mul_(seen / labels)
    return found


def _labels(batch: Mapping[str, Any], name: str) -> int:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        raise UserError(
            f"relative_fisher: a batch of the {name} set has no labels: batches are dictionaries with them."
        )
    count = int((labels != IGNORED).sum())
    if count == 0:
        raise UserError(f"relative_fisher: a batch of the {name} set has no label that counts, all are {IGNORED}.")
    return count


def _singly(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for batch in batches:
        for row in range(len(batch["labels"])):
            yield {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
