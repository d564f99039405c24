"""Strict loading of an adapter's tensors: each must have its place, and each place its tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loratlas.engine.binding import BASE_HASH
from loratlas.engine.making import Making
from loratlas.errors import UserError

_PREFIX = "base_model.model."


def place(
    layers: Iterable[tuple[str, Making]], adapter_name: str, tensor_prefix: str, mapped: Mapping[str, Tensor]
) -> None:
    """Make the layers of `adapter_name` ready for the tensors of its file; only ranks and growing buffers adapt.

    Args:
        layers: (module path, layer) of all that carry the adapter.
        tensor_prefix: of our tensors' names in the file, as in `registry`.
        mapped: the file's tensors under the names that the model has for them.

    Raises:
        UserError: tensors that are missing, have no place or another shape, with the counts. The model is as it was.
    """
    missing, matched, expected = [], 0, set[str]()
    misshapen: list[str] = []
    resized: list[tuple[Any, Tensor]] = []
    for path, layer in layers:
        keys = {n: f"{path}.{layer.prefix}{n}.{adapter_name}" for n in (*layer.method.params, *layer.buffer_names())}
        found = {name: mapped.get(key, mapped.get(_PREFIX + key)) for name, key in keys.items()}
        try:
            layer.check_base(adapter_name, found.get(BASE_HASH))
        except UserError as error:
            raise UserError(f"module {path.removeprefix(_PREFIX)}: {error}") from None
        layer.fit(adapter_name, {name: value for name, value in found.items() if value is not None})
        for name, key in keys.items():
            store, value = layer.store(name), found[name]
            if adapter_name not in store:
                continue
            expected |= {key, _PREFIX + key}
            if value is None:
                missing.append(key)
                continue
            own = store[adapter_name]
            if value.shape != own.shape:
                if name not in layer.method.growing:
                    shapes = f"{tuple(value.shape)}, but this model and config need {tuple(own.shape)}"
                    misshapen.append(f"{key} has shape {shapes}")
                    continue
                resized.append((store, torch.zeros(value.shape, dtype=own.dtype, device=own.device)))
            matched += 1
    surplus = [key for key in mapped if f".{tensor_prefix}" in key and key not in expected]
    counts = f"matched {matched}, missing {len(missing)}, unexpected {len(surplus)}"
    if misshapen:
        raise UserError(
            f"adapter file: {misshapen[0]} ({counts}); load it on the base model and with the adapter_config.json "
            "it was trained with."
        )
    if missing:
        raise UserError(
            f"adapter file: tensors are missing ({counts}), the first is {missing[0]}; the file belongs to another "
            "model or method, or was cut short."
        )
    if surplus:
        raise UserError(
            f"adapter file: tensors have no place in this model, the first is {surplus[0]} ({counts}); load it on "
            "the base model and with the adapter_config.json it was trained with."
        )
    for store, room in resized:
        store[adapter_name] = room
