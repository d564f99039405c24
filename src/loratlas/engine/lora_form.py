"""One module's update in the form of a plain LoRA: two thin factors, cut to a rank and rounded to a dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas import catalog
from loratlas.engine.layer import AtlasLayer, joined_factors
from loratlas.engine.method import Method, View
from loratlas.errors import UserError
from loratlas.linalg.lowrank import compress, concatenate, norm, pad


@dataclass(frozen=True, eq=False)
class LoraForm:
    """delta ~ up @ down, with up (out, k) and down (k, in) in the dtype of the file, scaling folded in.

    Attributes:
        bias: what the adapter adds to the layer's bias, (out,); None: nothing.
        exact_rank: the rank that cuts nothing.
        size: ||delta||_F. gap: ||delta - up @ down||_F, 0 where nothing but numerical zeros
            was cut and nothing rounded.
    """

    layer: AtlasLayer
    down: Tensor
    up: Tensor
    exact_rank: int
    size: float
    gap: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def tensors(self, path: str, rank: int, *, biased: bool = False) -> dict[str, Tensor]:
        """The factors, padded to `rank`, under the names and in the shapes of PEFT's LoRA; biased: with lora_bias."""
        up, down = pad(self.up, self.down, rank)
        try:
            factors = self.layer.op.lora_tensors(down, up)
        except UserError as error:
            raise UserError(f"module {path}: {error}") from None
        if not biased:
            return factors
        return {**factors, "lora_B.bias": up.new_zeros(len(up)) if self.bias is None else self.bias}


def lora_form(path: str, layer: AtlasLayer, adapter: str, rank: int | None, dtype: torch.dtype) -> LoraForm:
    """The update of `adapter` on the layer at `path`, of at most `rank` (None: exact) and rounded to `dtype`.

    Raises:
        UserError: the method has no LoRA form, or numbers that are not finite, in the adapter or in `dtype`.
    """
    down, up = _factors(path, layer, adapter)
    bias = layer.bias_delta([adapter])
    biases = [] if bias is None else [bias]
    if not _finite(down, up, *biases):
        raise UserError(f"module {path}: the adapter holds NaN or infinite numbers; check the training it comes from.")
    exact = min(down.shape[0], *layer.op.shape)
    limit = exact if rank is None else min(exact, rank)
    kept_down, kept_up, lost = down, up, 0.0
    if down.shape[0] > limit:
        packed = compress(up, down, rank=limit)
        kept_down, kept_up, lost = packed.down, packed.up, packed.error
    file_down, file_up = kept_down.to(dtype), kept_up.to(dtype)
    if not _finite(file_down, file_up, *(each.to(dtype) for each in biases)):
        raise UserError(f"module {path}: numbers of the update are beyond {dtype}; export it in torch.bfloat16.")
    rounded = not (_same(file_down, kept_down) and _same(file_up, kept_up))
    gap = norm(concatenate([(up, down), (-file_up.to(up.dtype), file_down.to(down.dtype))])) if lost or rounded else 0.0
    file_bias = None if bias is None else bias.to(dtype)
    return LoraForm(layer, file_down, file_up, exact, norm((up, down)), gap, file_bias)


def total_error(forms: Iterable[LoraForm]) -> float:
    """||delta - up @ down||_F / ||delta||_F over all modules together."""
    every = list(forms)
    lost = math.fsum(form.gap**2 for form in every)
    return math.sqrt(lost / math.fsum(form.size**2 for form in every)) if lost else 0.0


def _factors(path: str, layer: AtlasLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """(down, up) of the whole update; from the matrix itself where the method has no factors of its own."""
    view, method = View(layer, adapter), layer.method
    factors = joined_factors(view)
    if factors is not None:
        return factors
    if not method.additive:
        raise _no_form(path, method, "changes W by more than a sum")
    try:
        with torch.no_grad():
            delta = method.delta_weight(view)
    except NotImplementedError:
        raise _no_form(path, method, "has an update that is no fixed matrix") from None
    packed = compress(delta, torch.eye(delta.shape[1], dtype=delta.dtype, device=delta.device))
    return packed.down, packed.up


def _no_form(path: str, method: Method, reason: str) -> UserError:
    """Says how an adapter of the method can be shipped instead, by the catalogue."""
    words = {"merged": "export it as merged weights", "native": "ship the adapter's own folder"}
    row = next((row for row in (*catalog.systems(), *catalog.baselines()) if row.slug == method.name), None)
    forms = [words[form] for form in row.exports if form in words] if row is not None else []
    advice = " or ".join(forms or [words["native"]])
    return UserError(f"module {path}: {method.name} {reason}, so it has no LoRA form: {advice}.")


def _same(rounded: Tensor, own: Tensor) -> bool:
    return torch.equal(rounded.to(own.dtype), own)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
