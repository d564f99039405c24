"""Sparse differences to a base model that add up: what LT-SFT leaves (arXiv 2110.07560).

    W = W0 + phi_language + phi_task;   parameters that are no difference (a head) are kept as they are

    language.apply(model); task.apply(model)      # any order, the same model
    language.remove(model)                        # back from saved values, bit for bit
    both = compose_deltas([language, task]); both.save("both"); SparseDelta.load("both").merged(model)

A folder holds sparse_delta.safetensors and sparse_delta.json. It records a checksum of every base parameter it changes,
and refuses to be added to others.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratlas.engine.config import check_safetensors
from loratlas.errors import UserError
from loratlas.files import whole_directory, write_json

_TENSORS, _NOTE = "sparse_delta.safetensors", "sparse_delta.json"


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """A sparse difference.

    Attributes:
        indices: {parameter: sorted flat positions, row-major; int32, or int64 in parameters of 2^31 elements and more}.
        values: {parameter: what is added there, float32; float64 for a float64 model}.
        absolute: {parameter: its whole new value}, of what trained in full.
        shapes: {parameter in `indices`: its shape}.
        base: {parameter in `indices`: checksum of the base's values}; where one is missing nothing is checked.
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    absolute: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Entries that differ from the base."""
        return sum(values.numel() for values in self.values.values())

    def apply(self, model: nn.Module, absolute: bool = True) -> None:
        """Add it to `model` in place, beside the deltas that are there.

        Args:
            absolute: also write the parameters kept whole; False where only another delta's head is wanted.

        Raises:
            UserError: another base, parameters that the model lacks or has in another shape, the same delta or the same
                head twice. The model is then as it was.
        """
        stack = _stack(model)
        stack.change([*stack.deltas, (self, absolute)])

    def remove(self, model: nn.Module) -> None:
        """Take it off again: the values before it come from a copy, so that nothing drifts.

        Raises:
            UserError: it is not applied to `model`.
        """
        stack = _stack(model)
        rest = [entry for entry in stack.deltas if entry[0] is not self]
        if len(rest) == len(stack.deltas):
            raise UserError("this sparse delta is not applied to the model: remove takes the object that was applied.")
        stack.change(rest)

    def merged(self, model: Any, absolute: bool = True) -> Any:
        """A copy of `model` with the delta in its weights, an ordinary model with `save_pretrained`; raises as `apply`.

        Deltas that are applied to `model` are in the copy too.
        """
        twin = copy.deepcopy(model)
        if model in _STACKS:
            _STACKS[twin] = _STACKS[model].carried(twin)
        self.apply(twin, absolute)
        return twin

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write it to `directory`, whole or not at all."""
        tensors = {f"index:{name}": t for name, t in self.indices.items()}
        tensors |= {f"value:{name}": t for name, t in self.values.items()}
        tensors |= {f"absolute:{name}": t for name, t in self.absolute.items()}
        with whole_directory(directory) as folder:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / _TENSORS)
            write_json(folder / _NOTE, {"shapes": {n: list(s) for n, s in self.shapes.items()}, "base": self.base})
        return Path(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> SparseDelta:
        """Read what `save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(directory)
        missing = [name for name in (_NOTE, _TENSORS) if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} holds no {missing[0]}: give a folder that SparseDelta.save wrote.")
        check_safetensors(folder / _TENSORS)
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        kinds: dict[str, dict[str, Tensor]] = {"index": {}, "value": {}, "absolute": {}}
        for key, tensor in load_file(folder / _TENSORS).items():
            kind, _, name = key.partition(":")
            kinds[kind][name] = tensor
        shapes = {name: tuple(shape) for name, shape in note["shapes"].items()}
        delta = cls(kinds["index"], kinds["value"], shapes, kinds["absolute"], note["base"])
        delta._check(folder / _TENSORS)
        return delta

    @classmethod
    def load_official(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Read the `pytorch_diff.bin` of the official library (composable-sft), without running any code in it.

        It knows nothing of its base, so nothing is checked but shapes; `save` writes it in our form.

        Raises:
            UserError: not such a file, or one that holds more than tensors.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            parts, absolute = saved["diffs"], dict(saved["abs"])
            found = {name: _decoded(**part) for name, part in parts.items()}
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} is no pytorch_diff.bin that can be read safely ({type(error).__name__})."
            ) from None
        except Exception as error:  # torch raises pickle's own error for what it refuses to load
            raise UserError(f"{path} holds more than tensors, which is not loaded ({type(error).__name__}).") from None
        shapes = {name: tuple(part["size"]) for name, part in parts.items()}
        values = {name: pair[1] for name, pair in found.items()}
        delta = cls({name: pair[0] for name, pair in found.items()}, values, shapes, absolute)
        delta._check(Path(path))
        return delta

    def _check(self, file: Path) -> None:
        for name, shape in self.shapes.items():
            index, values = self.indices.get(name), self.values.get(name)
            whole = index is not None and values is not None and index.shape == values.shape
            size = torch.Size(shape).numel()
            if not whole or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size):  # type: ignore
                raise UserError(f"{file} is damaged: positions and values of {name} do not fit its shape {shape}.")


def compose_deltas(deltas: Sequence[SparseDelta]) -> SparseDelta:
    """The sum of deltas of one base, in any order; entries of several add up.

    Raises:
        UserError: deltas of different bases or shapes, or two that both bring a parameter whole.
    """
    _same_base(deltas)
    shapes = {name: shape for delta in deltas for name, shape in delta.shapes.items()}
    base = {name: mark for delta in deltas for name, mark in delta.base.items()}
    absolute = {name: value for delta in deltas for name, value in delta.absolute.items()}
    pairs = {name: _added([d for d in deltas if name in d.shapes], name) for name in shapes}
    indices = {name: pair[0] for name, pair in pairs.items()}
    return SparseDelta(indices, {name: pair[1] for name, pair in pairs.items()}, shapes, absolute, base)


def fingerprint(values: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: checksum of shape, dtype and values}."""
    marks = {}
    for name, value in values.items():
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
        for chunk in value.detach().flatten().split(1 << 24):
            digest.update(chunk.contiguous().view(torch.uint8).cpu().numpy())
        marks[name] = digest.hexdigest()[:16]
    return marks


def base_fingerprint(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, str]:
    """`fingerprint` of `values`, which are parameters of `model`, as they were before any delta was applied to it."""
    known = _STACKS[model].marks if model in _STACKS else {}
    return {name: known.get(name) or fingerprint({name: value})[name] for name, value in values.items()}


class _Stack:
    """The deltas applied to one model, and what stood where they wrote."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.deltas: list[tuple[SparseDelta, bool]] = []
        self.marks: dict[str, str] = {}  # of parameters that deltas have changed, before they did
        self._saved: list[tuple[str, Tensor | None, Tensor]] = []  # (parameter, positions or None for all, values)

    @torch.no_grad()
    def change(self, deltas: list[tuple[SparseDelta, bool]]) -> None:
        """Leave exactly `deltas` applied."""
        model = self.model()
        assert model is not None  # whoever calls holds it
        params = dict(model.named_parameters())
        self._refuse(params, deltas)
        for name, at, values in self._saved:
            target = params[name] if at is None else params[name].view(-1)
            target.copy_(values) if at is None else target.index_copy_(0, at.to(target.device), values)
        self._saved, self.deltas = [], deltas
        sums = {n: [d for d, _ in deltas if n in d.shapes] for d, _ in deltas for n in d.shapes}
        for name, parts in sums.items():
            flat = params[name].view(-1)
            index, values = (t.to(flat.device) for t in _added(parts, name))
            index = index.long()
            before = flat[index]
            self._saved.append((name, index, before))
            flat[index] = (before.to(values.dtype) + values).to(flat.dtype)
        for delta, whole in deltas:
            for name, value in delta.absolute.items() if whole else ():
                self._saved.append((name, None, params[name].clone()))
                params[name].copy_(value)
        if not deltas:
            self.marks = {}

    def carried(self, model: nn.Module) -> _Stack:
        twin = _Stack(model)
        twin.deltas, twin.marks, twin._saved = list(self.deltas), dict(self.marks), list(self._saved)
        return twin

    def _refuse(self, params: Mapping[str, Tensor], deltas: list[tuple[SparseDelta, bool]]) -> None:
        if len({id(delta) for delta, _ in deltas}) < len(deltas):
            raise UserError("this sparse delta is applied to the model already: remove it first.")
        _same_base([delta for delta, _ in deltas], [delta for delta, whole in deltas if whole])
        for delta, whole in deltas:
            shapes = {**delta.shapes, **({n: tuple(v.shape) for n, v in delta.absolute.items()} if whole else {})}
            for name, shape in shapes.items():
                if name not in params:
                    hint = "; absolute=False leaves heads out" if name in delta.absolute else ""
                    raise UserError(f"the model has no parameter {name}, which the sparse delta changes{hint}.")
                if tuple(params[name].shape) != shape:
                    raise UserError(f"{name} is {tuple(params[name].shape)} in the model and {shape} in the delta.")
        marks = dict(self.marks)
        for delta, _ in deltas:
            for name, mark in delta.base.items():
                if name not in marks:
                    marks[name] = fingerprint({name: params[name]})[name]
                if marks[name] != mark:
                    raise UserError(
                        f"the sparse delta belongs to another base model: {name} has other values here than where it "
                        "was trained; load that base, in the same dtype."
                    )
        for delta, _ in deltas:
            for name in delta.shapes:
                marks.setdefault(name, fingerprint({name: params[name]})[name])
        self.marks = marks


_STACKS: weakref.WeakKeyDictionary[nn.Module, _Stack] = weakref.WeakKeyDictionary()


def _stack(model: nn.Module) -> _Stack:
    return _STACKS.setdefault(model, _Stack(model))


def _same_base(deltas: Sequence[SparseDelta], heads: Iterable[SparseDelta] | None = None) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    marks: dict[str, str] = {}
    for delta in deltas:
        for name, shape in delta.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise UserError(
                    f"the sparse deltas do not add up: {name} is {shapes[name]} in one and {shape} in another."
                )
        for name, mark in delta.base.items():
            if marks.setdefault(name, mark) != mark:
                raise UserError(
                    f"the sparse deltas belong to different base models, which {name} shows: compose deltas of one."
                )
    seen: set[str] = set()
    for delta in deltas if heads is None else heads:
        twice = seen & set(delta.absolute)
        if twice:
            raise UserError(f"two sparse deltas both bring {min(twice)} whole: leave one of the two heads out.")
        seen |= set(delta.absolute)


def _added(parts: Sequence[SparseDelta], name: str) -> tuple[Tensor, Tensor]:
    """(positions, values) of the sum. In float64, where sums of a few float32 do not depend on their order."""
    if len(parts) == 1:
        return parts[0].indices[name], parts[0].values[name]
    index, place = torch.unique(torch.cat([d.indices[name].long() for d in parts]), return_inverse=True)
    values = torch.cat([d.values[name].double() for d in parts])
    total = values.new_zeros(len(index)).index_add_(0, place, values)
    return index.to(parts[0].indices[name].dtype), total.to(parts[0].values[name].dtype)


def _decoded(size: Sequence[int], index_steps: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major (positions, values) of the official coding: sorted steps, the first axis fastest."""
    rest = index_steps.long().cumsum(0)  # the official reader's int32 overflows beyond 2^31 elements
    strides = torch.empty(tuple(size), device="meta").stride()
    flat = torch.zeros_like(rest)
    for length, stride in zip(size, strides, strict=True):
        flat += rest % length * stride
        rest = rest // length
    if bool((rest != 0).any()):
        raise ValueError("positions beyond the tensor")
    order = flat.argsort()
    small = torch.Size(size).numel() < 2**31
    return flat[order].to(torch.int32 if small else torch.int64), values[order]
