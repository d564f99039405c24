"""Adam with its moments in 8 bits, blockwise with a dynamic map (Dettmers et al. 2021, arXiv 2110.02861)."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.optim.rules import AdamW, Group, State

BLOCK = 256
MIN_SIZE = 4096  # smaller tensors stay in full precision, as in bitsandbytes


class AdamW8bit(AdamW):
    """As `rules.AdamW`; a moment of at least 4096 numbers, in whole blocks of 256, is kept as codes and scales.

    State: "exp_avg" and "exp_avg_sq", uint8 in the shape of the moment, "exp_avg_scale" and "exp_avg_sq_scale", one
    float32 a block. Plain tensors, whichever library has made them: bitsandbytes if it is installed, else torchao.

    Raises:
        UserError: neither is installed.
    """

    def check(self, group: Group) -> None:
        super().check(group)
        _codec()

    def _adam_(
        self, targets: list[Tensor], grads: list[Tensor], states: list[State], group: Group, age: int, lr: float
    ) -> None:
        # one by one: the moments of all at once in full precision are what is to be saved
        for target, grad, state in zip(targets, grads, states, strict=True):
            super()._adam_([target], [grad], [state], group, age, lr)

    def read(self, state: State, name: str) -> Tensor:
        scale = state.get(f"{name}_scale")
        return state[name] if scale is None else _codec().decode(state[name], scale, name == "exp_avg")

    def write(self, state: State, name: str, value: Tensor) -> None:
        if value.numel() < MIN_SIZE or value.numel() % BLOCK:
            state[name] = value
        else:
            state[name], state[f"{name}_scale"] = _codec().encode(value, name == "exp_avg")


class _Codec(Protocol):
    def encode(self, x: Tensor, signed: bool) -> tuple[Tensor, Tensor]: ...
    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor: ...


@functools.cache
def _codec() -> _Codec:
    for make in (_BitsAndBytes, _TorchAO):
        try:
            return make()
        except ImportError:
            continue
    raise UserError(
        "8-bit moments need bitsandbytes or torchao, and neither is installed: pip install 'loratlas[quant]'."
    )


class _BitsAndBytes:
    def __init__(self) -> None:
        import bitsandbytes.functional as functional

        self._functional: Any = functional

    @functools.cache  # noqa: B019 - lives as long as the module
    def _map(self, signed: bool, device: torch.device) -> Tensor:
        return self._functional.create_dynamic_map(signed=signed).to(device)

    def encode(self, x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        codes, kept = self._functional.quantize_blockwise(
            x.float().contiguous(), code=self._map(signed, x.device), blocksize=BLOCK
        )
        return codes.view(x.shape), kept.absmax

    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        return self._functional.dequantize_blockwise(
            codes, absmax=scale, code=self._map(signed, codes.device), blocksize=BLOCK
        )


class _TorchAO:
    def __init__(self) -> None:
        from torchao.optim.subclass_8bit import OptimState8bit

        self._state: Any = OptimState8bit

    def encode(self, x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        packed = self._state.zeros(x.shape, signed, BLOCK, x.device)
        packed.copy_(x.float().contiguous())
        return packed.codes, packed.scale

    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        table = self._state.zeros((BLOCK,), signed, BLOCK, codes.device).qmap
        return self._state(codes, scale, table, signed).dequantize()
