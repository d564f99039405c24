"""The history of an adapter whose pairs are recomposed while it trains (SRLoRA), read from its own tensors."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from loratlas.analysis.adapter_folder import AdapterFolder, read_adapter
from loratlas.analysis.update import layer_tensors
from loratlas.errors import UserError


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
