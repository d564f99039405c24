"""State of optimizers, schedulers and generators as safetensors and JSON: nothing in it can run code when it is read.

    NAME.json          the nested dictionaries and lists, with numbers, texts and flags
    NAME.safetensors   the tensors and arrays; in the JSON stands {"$tensor": name}

What JSON does not know is written as a dictionary with one key that begins with $: tuples, dictionaries whose keys are
no texts, counters, numbers that are not finite, dtypes, and numpy arrays as their bytes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratlas.errors import UserError


def write_state(folder: Path, name: str, value: Any) -> None:
    """Write `value` as NAME.json and, if it holds tensors, NAME.safetensors. Not atomic: for use in a whole directory.

    Raises:
        UserError: something in it is no tensor or array and not made of None, flags, numbers, texts, lists, tuples
            and dictionaries; the sentence says where it stands.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(value, name, tensors)
    (folder / f"{name}.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    if tensors:
        save_file(_apart(tensors), folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> Any:
    """What `write_state` wrote, tensors on the CPU. Tuples, key types and dtypes are as they were.

    Raises:
        UserError: there is no such state in `folder`.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no {file.name}: it was written without that part, so it cannot be resumed.")
    tensors = folder / f"{name}.safetensors"
    return _unpack(json.loads(file.read_text(encoding="utf-8")), load_file(tensors) if tensors.is_file() else {})


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        return {"$tensor": _keep(_dense(value, where), where, tensors)}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        raw = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.uint8).copy())
        return {"$array": [_keep(raw, where, tensors), value.dtype.str, list(value.shape)]}
    if isinstance(value, np.generic):
        return _pack(value.item(), where, tensors)
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if type(value) in (list, tuple):
        items = [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if type(value) is tuple else items
    if isinstance(value, dict):
        kind = "$counter" if isinstance(value, Counter) else "$dict"
        if kind == "$dict" and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _pack(item, f"{where}.{key}", tensors) for key, item in value.items()}
        return {kind: [[_pack(k, where, tensors), _pack(v, f"{where}.{k}", tensors)] for k, v in value.items()]}
    raise UserError(
        f"{where} is a {type(value).__name__}, which safetensors and JSON cannot hold: a checkpoint takes tensors, "
        "arrays, numbers, texts, flags, lists, tuples and dictionaries."
    )


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if not kind.startswith("$"):
        return {key: _unpack(item, tensors) for key, item in tree.items()}
    value = tree[kind]
    if kind == "$tensor":
        return tensors[value]
    if kind == "$array":
        name, dtype, shape = value
        return np.frombuffer(tensors[name].numpy().tobytes(), dtype=dtype).reshape(shape).copy()
    if kind == "$float":
        return float(value)
    if kind == "$dtype":
        return getattr(torch, value)
    if kind == "$tuple":
        return tuple(_unpack(item, tensors) for item in value)
    pairs = {_unpack(k, tensors): _unpack(v, tensors) for k, v in value}
    return Counter(pairs) if kind == "$counter" else pairs


def _dense(tensor: Tensor, where: str) -> Tensor:
    """An ordinary CPU tensor with a storage of its own, as safetensors wants it."""
    known = type(tensor) in (Tensor, nn.Parameter)
    odd = tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex()
    if odd or not known:
        kind = f"{tensor.layout}, {tensor.dtype}, on {tensor.device}" if known else type(tensor).__name__
        raise UserError(
            f"{where} is a tensor that a checkpoint cannot hold ({kind}): sharded, sparse, quantised, complex and meta "
            "tensors need the library that made them."
        )
    return tensor.detach().to("cpu").contiguous()


def _keep(tensor: Tensor, where: str, tensors: dict[str, Tensor]) -> str:
    """Add `tensor` to those to write; returns its name there."""
    name = where
    while name in tensors:  # keys may have dots in them
        name += "_"
    tensors[name] = tensor
    return name


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where they are views or share memory: safetensors holds each once and whole."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        seen.add(storage.data_ptr())
    return tensors
