"""Giving a layer's adapters their tensors: their rank, their start, the place where they lie."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loratlas.engine.binding import ANOTHER_BASE, BASE_HASH, fingerprint
from loratlas.engine.config import AtlasConfig
from loratlas.engine.merging import Merging
from loratlas.engine.method import RELATIVE_FISHER
from loratlas.errors import UserError

CLOCK = ("step", "total_steps")  # int64 scalars kept with every adapter whose method acts while training


class Making(Merging):
    """The half of `AtlasLayer` that makes adapters; the layer supplies what is declared here."""

    prefix: ClassVar[str]
    path: str
    statistics: dict[str, Tensor]
    atlas_r: dict[str, int]
    atlas_alpha: dict[str, float | None]
    atlas_scaling: dict[str, float]
    quantization_backend: Any
    frozen_peft_weight_names: dict[str, tuple[str, ...]]

    @classmethod
    def buffer_names(cls) -> tuple[str, ...]:
        bound = (BASE_HASH,) if cls.method.overrides("bound") else ()
        return cls.method.buffers + bound + (CLOCK if cls.method.has_lifecycle() else ())

    def store(self, name: str) -> Any:
        """The dictionary {adapter: tensor} of one of the method's tensors."""
        raise NotImplementedError

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
            if self.method.bound(config):
                self.store(BASE_HASH)[adapter].copy_(fingerprint(self.base_matrix()))
            self.derive(adapter)
        return self.atlas_r[adapter]

    def _own_statistics(self, config: AtlasConfig, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics that the method asks for, on the layer's device."""
        n_out, n_in = self.op.shape
        found = {}
        for name in self.method.gather(config):
            if name not in given:
                relative = name == RELATIVE_FISHER
                call = f"{name}(model, config, forget, retain)" if relative else "calibrate(model, config, batches)"
                raise UserError(
                    f"{self.method.name} starts from the {name} of this layer on your data: call "
                    f"loratlas.{call} before get_peft_model."
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
        if self.method.bound(config):
            self.store(BASE_HASH)[adapter] = torch.zeros(4, dtype=torch.int64, device=device)
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

    def check_base(self, adapter: str, saved: Tensor | None) -> None:
        """Raise `UserError` if the hash in an adapter's file, `saved`, is not that of this layer's weight."""
        if saved is None or not getattr(self.atlas_config[adapter], "check_base", True) or _on_meta(self.base_layer):
            return
        if not torch.equal(fingerprint(self.base_matrix()), saved.cpu()):
            raise UserError(ANOTHER_BASE)

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
        for name in self.method.shared:
            # where layers lie on several devices of a kind, the tensor stays on one of them
            store = self.store(name)
            if adapter_name in store and place is not None and store[adapter_name].device.type != place.type:
                store[adapter_name] = store[adapter_name].to(place)
        self.keep_on_host()

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


def _on_meta(module: Any) -> bool:
    return any(p.device.type == "meta" for p in module.parameters())
