"""`AtlasLayer`: one adapted layer with any number of adapters of one method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig
from loratlas.engine.factors import low_rank_branch
from loratlas.engine.fused import can_fuse, fused_linear, has_hooks
from loratlas.engine.making import Making
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.ops import Op, op_for
from loratlas.engine.shared import Shared
from loratlas.engine.transform import transformed
from loratlas.errors import UserError

BASE = "__base__"  # PEFT's name for "no adapter" in mixed batches


class AtlasLayer(nn.Module, Making):
    """Wraps a base layer, which is called but never written to.

    Subclasses are made by `registry.adapter`, one for each method and layer kind; they fix `method`, `prefix` and
    `kind`. Tensors lie in one ParameterDict or BufferDict a name, keyed by adapter: `<PREFIX><name>[adapter]`. That is
    the structure which PEFT saves, loads, moves and deletes without further code.
    """

    kind: ClassVar[str]

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = ""  # in the base model; for messages
        # without the quantiser's recipe (a base quantised by hand) everything but merging works
        recipe = quantization.get("get_apply_tensor_subclass") or _no_recipe
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=recipe
        )
        self.op: Op = op_for(self.get_base_layer(), self.kind)
        self.in_features: int | None
        self.out_features: int | None
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.atlas_config: dict[str, AtlasConfig] = {}
        self.atlas_r: dict[str, int] = {}
        self.atlas_alpha: dict[str, float | None] = {}
        self.atlas_scaling: dict[str, float] = {}
        for name in self.method.params:
            setattr(self, self.prefix + name, nn.ParameterDict())
        for name in self.buffer_names():
            setattr(self, self.prefix + name, BufferDict(persistent=True))
        for name in self.method.derived:
            setattr(self, self.prefix + name, BufferDict(persistent=False))
        for name in self.method.shared:
            setattr(self, self.prefix + name, Shared())  # the model puts the one of all layers in its place
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._untouched = None
        self.statistics: dict[str, Tensor] = {}
        self.register_load_state_dict_pre_hook(_grow_before_load)
        self.register_load_state_dict_post_hook(_derive_after_load)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.prefix + name for name in self.method.params)

    @property
    def other_param_names(self) -> tuple[str, ...]:  # type: ignore[override]
        tensors = tuple(self.prefix + name for name in self.buffer_names() + self.method.derived + self.method.shared)
        return (*tensors, "atlas_config", "atlas_r", "atlas_alpha", "atlas_scaling", "frozen_peft_weight_names")

    def store(self, name: str) -> Any:
        """The dictionary {adapter: tensor} of one of the method's tensors."""
        try:
            return self._modules[self.prefix + name]
        except KeyError:
            raise AttributeError(f"{self.method.name} declares no tensor {name!r}") from None

    def view(self, adapter: str) -> View:
        return View(self, adapter)

    def adapters(self) -> list[str]:
        return list(self.atlas_config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AtlasLayer:
        super()._apply(fn, recurse)
        self._move_untouched(fn)
        self.keep_on_host()
        return self

    # --------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self._disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self._disable_adapters:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self._disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.atlas_config]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted_forward(x, names, *args, **kwargs)

    def _adapted_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not self.method.additive:
            return transformed(self, x, [self.view(name) for name in names])
        if len(names) == 1 and not (args or kwargs):
            result = self._fused_forward(x, self.view(names[0]))
            if result is not None:
                return result
        untouched = base(x, *args, **kwargs)
        if self.quantization_backend is not None:
            untouched = self.quantization_backend.maybe_clone_base_result(untouched)
        y = untouched
        for name in names:
            view = self.view(name)
            y = y + self.method.branch(view, x, untouched, partial(self._dropped, config=view.cfg)).to(y.dtype)
        return y

    def _fused_forward(self, x: Tensor, view: View) -> Tensor | None:
        """The output by the fused op, over a dense working weight or by the method's `whole`; None if none applies."""
        base: Any = self.base_layer
        method = self.method
        dropout = view.cfg.lora_dropout if self.training else 0.0
        if method.overrides("whole") and can_fuse(base):
            y = method.whole(view, x, self.op.canonical(base.weight), base.bias, dropout)
            if y is not None:
                return y
        if not isinstance(method, LowRankMethod):
            return None
        working = method.working(view)
        if can_fuse(base):
            weight, factors = working or (self.op.canonical(base.weight), method.factors(view))
            return fused_linear(x, weight, base.bias, factors, dropout)
        if working is None or has_hooks(base):
            return None
        weight, factors = working
        y = self.op.full(base, x, weight)
        return y + low_rank_branch(self.op, self._dropped(x, view.cfg), factors).to(y.dtype)

    def _dropped(self, x: Tensor, config: AtlasConfig) -> Tensor:
        if config.lora_dropout == 0.0 or not self.training or not self.op.takes_dropout:
            return x
        return nn.functional.dropout(x, config.lora_dropout)

    def _mixed_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Every sample of the batch through the adapter named for it; '__base__' means none."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = self.base_layer(x, *args, **kwargs).clone()
        for name in sorted(set(adapter_names) & set(self.atlas_config)):
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            if self.method.additive:
                view = self.view(name)
                branch = self.method.branch(view, x[rows], y[rows], partial(self._dropped, config=view.cfg))
                y[rows] += branch.to(y.dtype)
            else:
                y[rows] = self._adapted_forward(x[rows], [name], *args, **kwargs)
        return y

    # --------------------------------------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of `adapter` in the shape in which the base layer stores its weight."""
        if not self.method.additive:
            raise UserError(f"{self.method.name} is not a sum W + delta: use merge_and_unload to get its weights.")
        with torch.no_grad():
            delta = self.method.delta_weight(self.view(adapter))
        return self.op.stored(delta, self.get_base_weight())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT converts the weight's update alone
        plain = self.method.additive and self.bias_delta([adapter_name]) is None
        return plain and self.op.kind in ("linear", "conv1d")

    # --------------------------------------------------------------------------------------------------- scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling to `scale` times its configured value."""
        if adapter in self.atlas_scaling:
            self._rescale(adapter, scale * self._configured_scale(adapter))

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            if name in self.atlas_scaling:
                self._rescale(name, self.atlas_scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.atlas_scaling:
                now = self.atlas_scaling[name]
                self._rescale(name, self._configured_scale(name) if scale is None else now / scale)

    def _rescale(self, adapter: str, scaling: float) -> None:
        self.atlas_scaling[adapter] = scaling
        self.derive(adapter)

    def _configured_scale(self, name: str) -> float:
        return self.method.scale(self.atlas_config[name], self.atlas_r[name], self.atlas_alpha[name])

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def joined_factors(view: View) -> tuple[Tensor, Tensor] | None:
    """(down, up) of a low-rank adapter as it is exported, scaling folded in; None for other methods."""
    with torch.no_grad():
        return view.layer.method.lora_factors(view)


def _grow_before_load(layer: AtlasLayer, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the whole model is loaded as well when buffers have grown in between."""
    for name in layer.method.growing:
        store = layer.store(name)
        for adapter in layer.adapters():
            value = state.get(f"{prefix}{layer.prefix}{name}.{adapter}")
            if value is not None and adapter in store and value.shape != store[adapter].shape:
                store[adapter] = store[adapter].new_zeros(value.shape)


def _derive_after_load(layer: AtlasLayer, _: Any) -> None:
    for adapter in layer.adapters():
        try:
            layer.derive(adapter)
        except UserError as error:
            raise UserError(f"module {layer.path}: {error}") from None


def _no_recipe() -> Any:
    raise UserError(
        "this torchao base was quantised without a quantisation config, so a merged weight cannot be quantised again: "
        "load the model with quantization_config=TorchAoConfig(...), or use the adapter unmerged."
    )
