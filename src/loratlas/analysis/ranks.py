"""How the rank of each layer moved while training, of adapters that keep a log of it."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from loratlas.analysis.adapter_folder import AdapterFolder, read_adapter
from loratlas.analysis.update import layer_tensors


def rank_history(adapter: AdapterFolder | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """One entry a layer, in the order of the file; empty for adapters whose ranks do not move.

    Each is {"layer", "steps", "ranks"}: from the end of optimizer step steps[i] on, module `layer` had the rank
    ranks[i]. steps[0] is the step at which the log begins, 0 in a run that was followed from its start. Of an adapter
    that has learned several tasks it is the last one.

    Raises:
        UserError: `adapter` is a path that `read_adapter` refuses.
    """
    folder = adapter if isinstance(adapter, AdapterFolder) else read_adapter(adapter)
    layers = layer_tensors(folder).items()
    logs = {layer: _last_plan(tensors["rank_log"]) for layer, tensors in layers if "rank_log" in tensors}
    return [
        {"layer": layer, "steps": log[:, 0].tolist(), "ranks": log[:, 1].tolist()}
        for layer, log in logs.items()
        if len(log)
    ]


def _last_plan(log: Tensor) -> Tensor:
    """The log from its last entry of step 0 on."""
    starts = (log[:, 0] == 0).nonzero().flatten()
    return log[int(starts[-1]) :] if len(starts) else log


def rank_at(history: dict[str, Any], step: int) -> int:
    """The rank after optimizer step `step` of one entry of `rank_history`; its first one before the log begins."""
    passed = sum(moved <= step for moved in history["steps"])
    return int(history["ranks"][max(0, passed - 1)])
