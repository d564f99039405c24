"""`AtlasLayer`: one adapted layer with any number of adapters of one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig
from loratlas.engine.fused import can_fuse, fused_linear, has_hooks
from loratlas.engine.merging import Merging
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.ops import Op, op_for
from loratlas.errors import UserError

BASE = "__base__"  # PEFT's name for "no adapter" in mixed batches
CLOCK = ("step", "total_steps")  # int64 scalars kept with every adapter whose method acts while training


class AtlasLayer(nn.Module, Merging):
    """Wraps a base layer, which is called but never written to.

    Subclasses are made by `registry.adapter`, one for each method and layer kind; they fix `method`, `prefix` and
    `kind`. Tensors lie in one ParameterDict or BufferDict a name, keyed by adapter: `<PREFIX><name>[adapter]`. That is
    the structure which PEFT saves, loads, moves and deletes without further code.
    """

    prefix: ClassVar[str]
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
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._untouched = None
        self.statistics: dict[str, Tensor] = {}
        self.register_load_state_dict_pre_hook(_grow_before_load)
        self.register_load_state_dict_post_hook(_derive_after_load)

    @classmethod
    def buffer_names(cls) -> tuple[str, ...]:
        return cls.method.buffers + (CLOCK if cls.method.has_lifecycle() else ())

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.prefix + name for name in self.method.params)

    @property
    def other_param_names(self) -> tuple[str, ...]:  # type: ignore[override]
        tensors = tuple(self.prefix + name for name in self.buffer_names() + self.method.derived)
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

    # ------------------------------------------------------------------------------------------ making an adapter

    def update_layer(
        self, adapter: str, config: AtlasConfig, r: int, alpha: float | None, statistics: dict[str, Tensor]
    ) -> int:
        """Add `adapter`; returns its rank, which is below `r` where the layer has fewer useful directions.

        statistics: what `calibrate` gathered of this layer.

        Raises:
            UserError: the method's start needs statistics that are not there or belong to another layer.
        """
        base = self.get_base_layer()
        needs_start = not (config.initialized or _on_meta(base))
        self.allocate(adapter, config, r, alpha)
        if needs_start and not _on_meta(self):
            self.statistics = self._own_statistics(config, statistics)
            with torch.no_grad():
                usable = self.method.init(self.view(adapter), self.base_matrix)
                if usable is not None and usable < r:
                    self.allocate(adapter, config, usable, alpha)
                    self.method.init(self.view(adapter), self.base_matrix)
            self.statistics = {}
            self.derive(adapter)
        return self.atlas_r[adapter]

    def _own_statistics(self, config: AtlasConfig, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics that the method asks for, on the layer's device."""
        n_out, n_in = self.op.shape
        found = {}
        for name in self.method.gather(config):
            if name not in given:
                raise UserError(
                    f"{self.method.name} starts from the {name} of this layer on your data: call "
                    "loratlas.calibrate(model, config, batches) before get_peft_model."
                )
            expected = (n_in, n_in) if name == "activation" else (n_out, n_in)
            if given[name].shape != expected:
                raise UserError(
                    f"its calibrated {name} is {tuple(given[name].shape)} instead of {expected}: calibrate the very "
                    "model that you adapt."
                )
            found[name] = given[name].to(self._adapter_place()[0])
        return found

    def allocate(self, adapter: str, config: AtlasConfig, r: int, alpha: float | None) -> None:
        """Give `adapter` its tensors, all zeros, at rank r."""
        n_out, n_in = self.op.shape
        device, dtype = self._adapter_place()
        self.atlas_config[adapter] = config
        self.atlas_r[adapter] = r
        self.atlas_alpha[adapter] = alpha
        self.atlas_scaling[adapter] = self.method.scale(config, r, alpha)
        dtypes, frozen = self.method.dtypes(), self.method.frozen(config)
        for name, shape in self.method.shapes(config, r, n_in, n_out).items():
            zeros = torch.zeros(shape, dtype=dtypes.get(name, dtype), device=device)
            trains = name in self.method.params
            self.store(name)[adapter] = nn.Parameter(zeros, requires_grad=name not in frozen) if trains else zeros
        # PEFT switches these off again after every set_adapter
        self.frozen_peft_weight_names[adapter] = tuple(self.prefix + name for name in frozen)
        if self.method.has_lifecycle():
            for name in CLOCK:
                self.store(name)[adapter] = torch.zeros((), dtype=torch.int64, device=device)

    def fit(self, adapter: str, tensors: dict[str, Tensor]) -> None:
        """Take the rank of `tensors`, a saved layer by tensor name, if the method finds another one in them."""
        r = self.method.rank_in(self.atlas_config[adapter], tensors)
        if r is None or r == self.atlas_r[adapter]:
            return
        live = [name for name in self.method.params if adapter in self.store(name)]
        flags = {name: self.store(name)[adapter].requires_grad for name in live}
        self.allocate(adapter, self.atlas_config[adapter], r, self.atlas_alpha[adapter])
        for name, flag in flags.items():
            self.store(name)[adapter].requires_grad_(flag)

    def _adapter_place(self) -> tuple[torch.device | None, torch.dtype]:
        """Device of the base weight, and fp32, or fp64 for fp64 bases."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        on_meta = device is not None and device.type == "meta"
        return (None if on_meta else device), torch.float64 if dtype == torch.float64 else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base dtype, which would round fp32 starts of bf16 models
        place = device or self._adapter_place()[0]
        for name in (*self.method.params, *self.buffer_names(), *self.method.derived):
            store = self.store(name)
            if adapter_name in store and place is not None and store[adapter_name].device.type != "meta":
                moved = store[adapter_name].to(place)
                store[adapter_name] = nn.Parameter(moved, moved.requires_grad) if name in self.method.params else moved
        self.keep_on_host()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AtlasLayer:
        super()._apply(fn, recurse)
        self._move_untouched(fn)
        self.keep_on_host()
        return self

    def keep_on_host(self) -> None:
        """Bring the buffers that the method keeps in CPU memory back there after the layer has moved."""
        for adapter, config in self.atlas_config.items():
            for name in self.method.on_host(config):
                store = self.store(name)
                if adapter in store and store[adapter].device.type != "meta":
                    store[adapter] = store[adapter].cpu()

    def base_matrix(self) -> Tensor:
        weight = self.get_base_weight() if self._untouched is None else self._untouched["weight"]
        if self._untouched is not None and self.quantization_backend is not None:
            raise UserError("adapters are merged into a quantised weight: call unmerge_adapter() first.")
        return self.op.canonical(weight.to(self._adapter_place()[1]))

    def derive(self, adapter: str) -> None:
        if self.method.derived:
            with torch.no_grad():
                self.method.derive(self.view(adapter), self.base_matrix)

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
            weight = self.base_matrix()
            for name in names:
                weight = self.method.merged(self.view(name), weight)
            return self.op.full(base, x, weight.to(self.weight.dtype))
        if len(names) == 1 and isinstance(self.method, LowRankMethod) and not (args or kwargs):
            view = self.view(names[0])
            result = self._fused_forward(x, view, self.method)
            if result is not None:
                return result
        y = base(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for name in names:
            view = self.view(name)
            y = y + self.method.delta(view, self._dropped(x, view.cfg)).to(y.dtype)
        return y

    def _fused_forward(self, x: Tensor, view: View, method: LowRankMethod) -> Tensor | None:
        """The output by the fused op or over the method's dense working weight; None where neither applies."""
        base: Any = self.base_layer
        dropout = view.cfg.lora_dropout if self.training else 0.0
        working = method.working(view)
        if can_fuse(base):
            weight, factors = working or (self.op.canonical(base.weight), method.factors(view))
            return fused_linear(x, weight, base.bias, factors, dropout)
        if working is None or has_hooks(base):
            return None
        weight, factors = working
        y = self.op.full(base, x, weight)
        return y + self.op.low_rank(self._dropped(x, view.cfg), *factors.joined()).to(y.dtype)

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
                y[rows] += self.method.delta(self.view(name), x[rows]).to(y.dtype)
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
        return self.method.additive and self.op.kind in ("linear", "conv1d")

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
    """(down, up) of a low-rank adapter without gradients, scaling folded in; None for other methods."""
    method = view.layer.method
    if not isinstance(method, LowRankMethod):
        return None
    with torch.no_grad():
        return method.factors(view).joined()


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


def _on_meta(module: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in module.parameters())


def _no_recipe() -> Any:
    raise UserError(
        "this torchao base was quantised without a quantisation config, so a merged weight cannot be quantised again: "
        "load the model with quantization_config=TorchAoConfig(...), or use the adapter unmerged."
    )
