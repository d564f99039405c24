"""Merging adapters into a layer's weight and taking them out again, bit for bit.

PEFT adds the update and later subtracts it, which drifts (1.5e-2 after 1,000 bf16 cycles, reported in TRL issue 6688).
Here the untouched weight is kept while adapters are merged, and put back.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig
from loratlas.engine.method import Method, View
from loratlas.engine.ops import Op
from loratlas.errors import UserError


class Merging(BaseTunerLayer):
    """The merging half of `AtlasLayer`, which supplies what is declared here."""

    method: ClassVar[Method]
    base_layer: nn.Module
    op: Op
    atlas_config: dict[str, AtlasConfig]

    # the base layer's own state while adapters are merged, else None
    _untouched: dict[str, Any] | None

    def view(self, adapter: str) -> View:
        """The tensors of one adapter as its method sees them."""
        raise NotImplementedError

    def base_matrix(self) -> Tensor:
        """The base weight as (out, in), dequantised, in fp32 or, for fp64 bases, fp64. A copy or a view: do not "
        "write."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W plus the updates in W's place. W itself is kept aside, so `unmerge` restores it bit for bit.

        safe_merge: refuse (ValueError) a result that is not finite. An error of any kind leaves the layer as it was.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.atlas_config]
        if not names:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise UserError(f"weights quantised with {self.quantization_backend.backend_name} cannot be merged into.")
        before, now = self._untouched, self._base_state()
        untouched = before or now
        # several merges start from the untouched W, so that rounding happens once
        self._put(untouched)
        self._untouched = None
        try:
            self._write_merged(self.merged_adapters + names, safe_merge)
        except Exception:
            self._put(now)
            self._untouched = before
            raise
        self._untouched = untouched
        self.merged_adapters = self.merged_adapters + names

    def _write_merged(self, names: list[str], check_finite: bool) -> None:
        stored = self.get_base_weight()
        weight = self.base_matrix()
        with torch.no_grad():
            for name in names:
                weight = self.method.merged(self.view(name), weight)
        shift = self.bias_delta(names)
        if check_finite and not all(torch.isfinite(t).all() for t in (weight, shift) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        value = self.op.stored(weight, stored).to(stored.dtype).contiguous()
        if self.quantization_backend is not None:
            self.set_base_weight(value)
        else:
            # a new Parameter: a weight that is tied to another layer stays what it is there
            self.get_base_layer().weight = nn.Parameter(value, requires_grad=False)
        if shift is not None:
            base: Any = self.get_base_layer()
            dtype = value.dtype if base.bias is None else base.bias.dtype
            base.bias = nn.Parameter((shift if base.bias is None else base.bias + shift).to(dtype), requires_grad=False)

    def bias_delta(self, names: list[str]) -> Tensor | None:
        """What merging `names` adds to the layer's own bias, (out,) without gradients; None: nothing."""
        if not self.method.overrides("bias_delta"):
            return None
        with torch.no_grad():
            found = [self.method.bias_delta(self.view(name)) for name in names]
        deltas = [delta for delta in found if delta is not None]
        return torch.stack(deltas).sum(0) if deltas else None

    def base_bias(self) -> Tensor | None:
        """The bias of the base layer, (out,), as it is without adapters; None if it has none."""
        base: Any = self.get_base_layer()
        return base.bias if self._untouched is None else self._untouched["bias"]

    def unmerge(self) -> None:
        """Put the untouched W back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._untouched is None:
            raise RuntimeError(f"{type(self).__name__} is marked as merged but holds no untouched weight.")
        self._put(self._untouched)
        self._untouched = None
        self.merged_adapters = []

    def _base_state(self) -> dict[str, Any]:
        base = self.get_base_layer()
        state = getattr(base, "state", None)  # bitsandbytes keeps quantised values outside the weight
        kept = {"base": base, "weight": base.weight, "state": copy.copy(vars(state)) if state else None}
        return kept | ({"bias": base.bias} if self.method.overrides("bias_delta") else {})

    def _move_untouched(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Let the weight that unmerging brings back follow the model to another device or dtype."""
        if self._untouched is not None and self.quantization_backend is None:
            for tensor in (self._untouched["weight"], self._untouched.get("bias")):
                if tensor is not None:
                    tensor.data = fn(tensor.data)

    def _put(self, kept: dict[str, Any]) -> None:
        holder: Any = self
        while hasattr(holder.base_layer, "base_layer"):
            holder = holder.base_layer
        holder.base_layer = kept["base"]  # some quantisers replace the whole layer on merging
        kept["base"].weight = kept["weight"]
        if "bias" in kept:
            kept["base"].bias = kept["bias"]
        if kept["state"] is not None:
            vars(kept["base"].state).update(kept["state"])
