"""The low-rank pairs that train in a model, whoever made them: adapters of ours and PEFT's LoRA.

    W' = W + s B A + what does not train,      A (r, in), B (out, r)

Optimizers that work on pairs find them here. Which of a method's tensors are A and B the method says itself (`pair`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from peft.tuners.lora import Embedding, LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention, _ConvNd
from torch import Tensor, nn

from loratlas.engine.layer import AtlasLayer
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.sharded import is_sharded
from loratlas.errors import UserError


class LowRankPair(ABC):
    """One adapter's pair on one layer.

    Attributes:
        path: of the layer in the model. adapter: the adapter's name.
        layer: the adapted layer, a PEFT tuner layer.
        kind: "linear" (Conv1D included), "convolution", "embedding" or "attention" (the input projection of PEFT's
            nn.MultiheadAttention).
        a, b: the parameters, in the shapes in which the layer keeps them.
    """

    kind: str

    def __init__(self, path: str, adapter: str, layer: Any, a: nn.Parameter, b: nn.Parameter) -> None:
        self.path, self.adapter, self.layer, self.a, self.b = path, adapter, layer, a, b

    @property
    def down(self) -> Tensor:
        """A, (r, in), detached."""
        return self.a.detach().flatten(1)

    @property
    def up(self) -> Tensor:
        """B, (out, r), detached."""
        return self.b.detach().flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return self.up.shape[0], self.down.shape[1]

    def gradients(self) -> tuple[Tensor, Tensor] | None:
        """(gA (r, in), gB (out, r)); None unless both are there."""
        if self.a.grad is None or self.b.grad is None:
            return None
        return self.a.grad.flatten(1), self.b.grad.flatten(1)

    @property
    @abstractmethod
    def scaling(self) -> float:
        """s, as it is now."""

    @abstractmethod
    def update(self) -> tuple[Tensor, Tensor]:
        """(down (k, in), up (out, k)), detached: the adapter's whole update up @ down, s and fixed parts included."""

    @abstractmethod
    def weight(self) -> Tensor:
        """W, (out, in), in the base layer's dtype; dequantised where it is quantised."""

    def in_use(self) -> bool:
        """Whether the layer's forward evaluates this adapter: switched on, active and not merged."""
        layer = self.layer
        return not (layer.disable_adapters or layer.merged) and self.adapter in layer.active_adapters


class _AtlasPair(LowRankPair):
    def __init__(self, path: str, view: View, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__(path, view.adapter, view.layer, a, b)
        self.kind = {"conv1d": "linear", "conv2d": "convolution"}.get(view.op.kind, view.op.kind)

    @property
    def scaling(self) -> float:
        return self.layer.atlas_scaling[self.adapter]

    def update(self) -> tuple[Tensor, Tensor]:
        down, up = self.layer.method.factors(self.layer.view(self.adapter)).joined()
        return down.detach(), up.detach()

    def weight(self) -> Tensor:
        return self.layer.op.canonical(self.layer.get_base_weight())


class _PeftPair(LowRankPair):
    _KINDS: ClassVar[dict[type, str]] = {
        _ConvNd: "convolution",
        Embedding: "embedding",
        MultiheadAttention: "attention",
    }

    def __init__(self, path: str, adapter: str, layer: Any) -> None:
        in_modules = adapter in layer.lora_A
        a = layer.lora_A[adapter].weight if in_modules else layer.lora_embedding_A[adapter]
        b = layer.lora_B[adapter].weight if in_modules else layer.lora_embedding_B[adapter]
        super().__init__(path, adapter, layer, a, b)
        self.kind = next((kind for cls, kind in self._KINDS.items() if isinstance(layer, cls)), "linear")

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter]

    def update(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up * self.scaling

    def weight(self) -> Tensor:
        weight = self.layer.get_base_weight()
        turned = self.kind == "embedding" or getattr(self.layer, "fan_in_fan_out", False)
        return (weight.T if turned else weight).reshape(self.shape)


def low_rank_pairs(model: nn.Module, user: str) -> list[LowRankPair]:
    """The trainable pairs of `model` in module order; at least one.

    Args:
        user: who wants to work on them, for the messages.

    Raises:
        UserError: there are none; a layer's adapter trains something else, or only one of A and B; a layer trains
            pairs of several adapters, or shares them with another layer; the pairs are sharded.
    """
    pairs: list[LowRankPair] = []
    for path, module in model.named_modules():
        if isinstance(module, AtlasLayer):
            pairs += _ours(path, module, user)
        elif isinstance(module, LoraLayer):
            pairs += _pefts(path, module, user)
    if not pairs:
        raise UserError(
            f"{user} works on low-rank pairs s B A, and {type(model).__name__} has none that train: give it a LoRA "
            "adapter first."
        )
    _check(pairs, user)
    return pairs


def other_parameters(model: nn.Module, pairs: Sequence[LowRankPair]) -> list[nn.Parameter]:
    """What else requires gradients, such as a head or biases."""
    factors = {id(p) for pair in pairs for p in (pair.a, pair.b)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in factors]


def _ours(path: str, layer: AtlasLayer, user: str) -> Iterator[LowRankPair]:
    for adapter in layer.adapters():
        view, method = layer.view(adapter), layer.method
        if not any(p.requires_grad for p in (getattr(view, name) for name in method.params) if p is not None):
            continue
        pair = method.pair(view) if isinstance(method, LowRankMethod) else None
        if pair is None:
            raise UserError(
                f"{user} works on low-rank pairs s B A, but adapter {adapter!r} of {path} is {method.name}, whose "
                "update is none: use LoRA or a method that trains such pairs."
            )
        yield _AtlasPair(path, view, *pair)


def _pefts(path: str, layer: Any, user: str) -> Iterator[LowRankPair]:
    for adapter in (*layer.lora_A, *layer.lora_embedding_A):
        pair = _PeftPair(path, adapter, layer)
        if not (pair.a.requires_grad or pair.b.requires_grad):
            continue
        variant = layer.lora_variant.get(adapter)
        grouped = pair.up.shape[1] != pair.down.shape[0]
        if variant is not None or isinstance(layer, ParamWrapper) or grouped:
            what = type(variant or layer).__name__.removesuffix("Variant") if not grouped else "a grouped convolution"
            raise UserError(
                f"{user} works on low-rank pairs s B A, but adapter {adapter!r} of {path} is PEFT's {what}, whose "
                "update is none: use plain LoRA there."
            )
        yield pair


def _check(pairs: Sequence[LowRankPair], user: str) -> None:
    seen: dict[int, LowRankPair] = {}
    layers: dict[int, LowRankPair] = {}
    for pair in pairs:
        for p in (pair.a, pair.b):
            if is_sharded(p):
                raise UserError(
                    f"{user} needs whole factors and gradients, but those of {pair.path} are sharded: use "
                    "DistributedDataParallel instead of FSDP."
                )
            if not p.requires_grad:
                raise UserError(
                    f"{user} moves A and B of a pair together, but in {pair.path} only one of them trains: train both."
                )
            if seen.setdefault(id(p), pair) is not pair:
                raise UserError(
                    f"{user} cannot tell apart the gradients of {seen[id(p)].path} and {pair.path}, which share a "
                    "factor: adapt only one of them."
                )
        if layers.setdefault(id(pair.layer), pair) is not pair:
            raise UserError(
                f"{user} trains one adapter at a time, but {pair.path} trains {layers[id(pair.layer)].adapter!r} and "
                f"{pair.adapter!r}: freeze one of them."
            )
