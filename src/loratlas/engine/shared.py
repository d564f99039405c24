"""Frozen tensors of which all layers of an adapter use one copy, sized over all of them: random bases.

Every layer holds the very same `Shared` for such a tensor, so that moving, copying and deleting the model's parts work
as for any buffer, also where layers are injected without a model around them. An adapter's file holds the tensor once,
under the name it has in the first layer; or, if the method can draw it again, only a fingerprint that is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from loratlas.engine.making import Making
from loratlas.engine.method import Method
from loratlas.errors import UserError
from loratlas.linalg.seeded import fingerprint, same_numbers

_FINGERPRINT = "_fingerprint"


class Shared(BufferDict):
    """{adapter: tensor}; adapters with equal tensors use one, wherever the model moves."""

    def __init__(self) -> None:
        super().__init__(persistent=True)

    def put(self, adapter: str, value: Tensor) -> None:
        """Give `adapter` its tensor: another adapter's if that is equal."""
        equal = (own for name, own in self.items() if name != adapter and _equal(own, value))
        self[adapter] = next(equal, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Shared:
        moved: dict[int, Tensor] = {}
        for name, tensor in self.items():
            if id(tensor) not in moved:
                moved[id(tensor)] = fn(tensor)
            self._buffers[name] = moved[id(tensor)]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # torch would copy into the tensor, which may be another adapter's as well
        for name, own in list(self.items()):
            value = state_dict.get(prefix + name)
            if value is None or value.shape != own.shape or own.is_meta:
                continue
            if not _equal(own, value):
                self.put(name, value.detach().to(own, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


def containers(layers: Iterable[tuple[str, Making]], method: Method) -> dict[str, Shared]:
    """{tensor name: the `Shared` that layers of `method` hold}, a new one where there are none yet."""
    for _, layer in layers:
        if layer.method is method:
            return {name: layer.store(name) for name in method.shared}
    return {name: Shared() for name in method.shared}


def for_file(chosen: dict[str, Tensor], method: Method, config: Any, prefix: str, adapter: str) -> dict[str, Tensor]:
    """`chosen`, what PEFT would save of an adapter, with each shared tensor once, or its fingerprint."""
    kept = dict(chosen)
    for name in method.shared:
        ending = f".{prefix}{name}.{adapter}"
        found = {key.removesuffix(ending): kept.pop(key) for key in chosen if key.endswith(ending)}
        if not found:
            continue
        path, value = next(iter(found.items()))
        # an empty tensor stands in for one that is still to be gathered (see `distributed`)
        if name in method.drawn_again(config) and value.numel():
            kept[f"{path}.{prefix}{name}{_FINGERPRINT}.{adapter}"] = fingerprint(value)
        else:
            kept[path + ending] = value
    return kept


def from_file(
    layers: list[tuple[str, Making]], adapter: str, prefix: str, mapped: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Take the shared tensors out of a file's tensors; returns what is to be loaded instead, {key: tensor}.

    Raises:
        UserError: one is missing or of another shape, or this machine draws other numbers than the file was made with.
    """
    loaded: dict[str, Tensor] = {}
    for name in layers[0][1].method.shared if layers else ():
        own = layers[0][1].store(name)[adapter]
        whole = _take(mapped, f".{prefix}{name}", adapter)
        print_ = _take(mapped, f".{prefix}{name}{_FINGERPRINT}", adapter)
        if whole is None and print_ is None:
            raise UserError(
                f"adapter file: the shared tensor {name} and its fingerprint are missing; the file belongs to another "
                "method, or was cut short."
            )
        if whole is not None and whole.shape != own.shape:
            raise UserError(
                f"adapter file: the shared tensor {name} has shape {tuple(whole.shape)}, but this model and config "
                f"need {tuple(own.shape)}; load it on the base model and with the adapter_config.json it was trained "
                "with."
            )
        if whole is None and print_ is not None and not same_numbers(fingerprint(own), print_):
            raise UserError(
                f"adapter file: the shared tensor {name} is drawn from a seed, and here other numbers come out than "
                "where the adapter was trained (another seed, base model or version of torch): load it as it was "
                "trained, or save it there with its bases."
            )
        value = own if whole is None else whole
        loaded |= {f"{path}.{prefix}{name}.{adapter}": value for path, _ in layers}
    return loaded


def _take(mapped: dict[str, Tensor], ending: str, adapter: str) -> Tensor | None:
    """Remove the tensors whose names end so, with or without the adapter's name; returns the first."""
    keys = [key for key in mapped if key.endswith((ending, f"{ending}.{adapter}"))]
    found = [mapped.pop(key) for key in keys]
    return found[0] if found else None


def _equal(own: Tensor, value: Tensor) -> bool:
    return own.shape == value.shape and torch.equal(own, value.to(own))
