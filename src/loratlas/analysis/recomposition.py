"""The history of an adapter whose pairs are recomposed while it trains (SRLoRA), read from its own tensors."""

from __future__ import annotations

import itertools
import os
from typing import Any

from torch import Tensor

from loratlas.analysis.adapter_folder import AdapterFolder, read_adapter
from loratlas.analysis.update import layer_tensors
from loratlas.engine.moments import fresh_rate
from loratlas.errors import UserError

ADAM = (0.9, 0.999)  # the betas of torch, transformers and of our runs
_EVERY_AGE = 10  # later ages are thinned out by a tenth each


def recompositions(adapter: AdapterFolder | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every event of every layer, in the order of steps; empty for adapters that do not recompose.

    Each is {"step", "layer", "slots", "old_dirs", "new_dirs"}: at optimizer step `step` the pairs in `slots` of module
    `layer` left the directions `old_dirs` of W's SVD (0 is the largest) for `new_dirs`.

    Raises:
        UserError: `adapter` is a path that `read_adapter` refuses.
    """
    folder = adapter if isinstance(adapter, AdapterFolder) else read_adapter(adapter)
    events: dict[tuple[int, str], dict[str, Any]] = {}
    for layer, tensors in recomposing_layers(folder).items():
        for step, slot, old, new in tensors["log"].tolist():
            empty: dict[str, Any] = {"step": step, "layer": layer, "slots": [], "old_dirs": [], "new_dirs": []}
            event = events.setdefault((step, layer), empty)
            event["slots"].append(slot)
            event["old_dirs"].append(old)
            event["new_dirs"].append(new)
    return sorted(events.values(), key=lambda event: event["step"])


def recomposing_layers(folder: AdapterFolder) -> dict[str, dict[str, Tensor]]:
    """{module path: its tensors by name} of the layers that carry a log of recompositions, in the order of the file."""
    return {layer: tensors for layer, tensors in layer_tensors(folder).items() if "log" in tensors}


def recomposition_state(folder: AdapterFolder, layer: str) -> dict[str, Any]:
    """Where one layer stands: {"layer", "events", "directions_used", "directions_total", "slot_directions"}.

    directions_used counts the directions of W that have been live so far, directions_total those as well that still
    wait; slot_directions[i] is the direction that slot i carries.

    Raises:
        UserError: the file lacks one of the layer's tensors.
    """
    tensors = recomposing_layers(folder)[layer]
    for name in ("events", "cursor", "slot_dir", "RA"):
        if name not in tensors:
            raise UserError(f"{folder.directory} lacks the tensor {name} of {layer}: save or copy the adapter again.")
    used = int(tensors["cursor"])
    return {
        "layer": layer,
        "events": int(tensors["events"]),
        "directions_used": used,
        "directions_total": used + tensors["RA"].shape[0],
        "slot_directions": tensors["slot_dir"].tolist(),
    }


def recomposition_states(folder: AdapterFolder) -> list[dict[str, Any]]:
    """`recomposition_state` of every layer that recomposes, in the order of the file."""
    return [recomposition_state(folder, layer) for layer in recomposing_layers(folder)]


def fresh_rates(folder: AdapterFolder, betas: tuple[float, float] = ADAM) -> list[dict[str, Any]]:
    """Learning rate of pairs that have started again, over that of the others, after every step with an event.

    Each is {"step", "ages", "factors"}: factors[i] holds ages[i] steps after the event of optimizer step `step`, until
    the next event of any layer or the end. Nothing is measured: optimizer_reset, the age, Adam's betas and fresh_warmup
    determine it, see `engine.moments.fresh_rate`. Of other optimizers than Adam it does not speak.
    """
    layers = recomposing_layers(folder)
    events = sorted({step for tensors in layers.values() for step in tensors["log"][:, 0].tolist()})
    end = max((int(tensors["step"]) for tensors in layers.values()), default=0)
    how, warmup = folder.config.get("optimizer_reset", "keep"), folder.config.get("fresh_warmup", 0)
    found = []
    for step, following in itertools.pairwise([*events, max([end, *events])]):
        ages = _some_ages(following - step)
        factors = [min(1.0, age / (warmup + 1)) * fresh_rate(how, age, step + age, betas) for age in ages]
        found.append({"step": step, "ages": ages, "factors": factors})
    return found


def _some_ages(last: int) -> list[int]:
    """From 1 to `last`: all the first ones, then ever fewer."""
    ages = list(range(1, min(last, _EVERY_AGE) + 1))
    while ages and ages[-1] < last:
        ages.append(min(last, ages[-1] + max(1, ages[-1] // 10)))
    return ages
