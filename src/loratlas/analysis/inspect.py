"""What an adapter file holds and what its update looks like: the content of `loratlas inspect`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratlas.analysis.adapter_folder import PREFIX, AdapterFolder, read_adapter
from loratlas.analysis.ranks import rank_history
from loratlas.analysis.recomposition import fresh_rates, recomposition_states, recompositions
from loratlas.analysis.update import layer_updates, method_of, tensor_prefix
from loratlas.linalg.lowrank import Pair, singular_values


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file. role: "parameter" (trained), "state" (the method's frozen tensors: starts, history,
    scores, counters) or "saved module" (a classifier head or bias that is saved along)."""

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class LayerEntry:
    """The update delta = W' - W of one layer.

    rank: the one it has now, where training moves it, else the configured one.
    shape: (out, in) of delta, in * kh * kw for convolutions. norm: ||delta||_F. singular_values: the non-zero ones,
    descending. effective_rank: see `effective_rank`. They are None where the file's factors alone do not give delta.
    """

    module: str
    rank: int
    shape: tuple[int, int] | None
    norm: float | None
    effective_rank: float | None
    singular_values: list[float] | None


@dataclass(frozen=True)
class Inspection:
    """All that `inspect_adapter` finds. file_bytes is the tensors' sum, without the file's header. recomposition has
    one entry a layer (`recomposition_state`), events one an event and layer (`recompositions`), fresh one a step with
    events (`fresh_rates`); all are empty for methods that do not recompose. ranks has one entry a layer whose rank
    moved while training (`rank_history`)."""

    directory: str
    method: str
    peft_type: str
    base_model: str | None
    task_type: str | None
    rank: int | None
    alpha: float | None
    target_modules: list[str] | str | None
    modules_to_save: list[str]
    file_bytes: int
    tensors: list[TensorEntry]
    layers: list[LayerEntry]
    recomposition: list[dict[str, Any]]
    events: list[dict[str, Any]]
    fresh: list[dict[str, Any]]
    ranks: list[dict[str, Any]]


def inspect_adapter(path: str | os.PathLike[str]) -> Inspection:
    """Read the adapter at `path` (its folder, or the output directory of a run) without loading its base model.

    Raises:
        UserError: there is no readable adapter at `path`.
    """
    folder = read_adapter(path)
    config, method = folder.config, method_of(folder)
    tensors = [_entry(folder, name, tensor) for name, tensor in folder.tensors.items()]
    targets, ranks = config.get("target_modules"), rank_history(folder)
    now = {entry["layer"]: entry["ranks"][-1] for entry in ranks}
    return Inspection(
        directory=str(folder.directory),
        method=method.name if method else str(config["peft_type"]).lower(),
        peft_type=config["peft_type"],
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        target_modules=sorted(targets) if isinstance(targets, list) else targets,
        modules_to_save=list(config.get("modules_to_save") or ()),
        file_bytes=sum(entry.bytes for entry in tensors),
        tensors=tensors,
        layers=[_layer(module, now.get(module, rank), update) for module, rank, update in layer_updates(folder)],
        recomposition=recomposition_states(folder),
        events=recompositions(folder),
        fresh=fresh_rates(folder),
        ranks=ranks,
    )


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of p_i = sigma_i / sum sigma (Roy and Vetterli, 2007): k for k equal values, 0 for none.

    values: singular values, (k,), none negative.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def _entry(folder: AdapterFolder, name: str, tensor: Tensor) -> TensorEntry:
    size = tensor.numel() * tensor.element_size()
    short = name.removeprefix(PREFIX)
    return TensorEntry(short, _role(folder, name), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), size)


def _role(folder: AdapterFolder, name: str) -> str:
    prefix, method = tensor_prefix(folder), method_of(folder)
    if not prefix or f".{prefix}" not in name:
        return "saved module"
    own = name.rpartition(f".{prefix}")[2]
    return "parameter" if method is None or own in method.params else "state"


def _layer(module: str, rank: int, update: Pair | None) -> LayerEntry:
    if update is None:
        return LayerEntry(module, rank, None, None, None, None)
    values = _nonzero_values(update)
    shape = (update[0].shape[0], update[1].shape[1])
    return LayerEntry(module, rank, shape, float(values.norm()), effective_rank(values), values.tolist())


def _nonzero_values(update: Pair) -> Tensor:
    """Singular values above the rounding of their computation: a stored pair can have more columns than rank."""
    up, down = (factor.double() for factor in update)
    floor = max(up.shape[0], down.shape[1]) * torch.finfo(torch.float64).eps * float(up.norm() * down.norm())
    values = singular_values((up, down))
    return values[values > floor]
