"""`AtlasModel`: PEFT's tuner over `AtlasLayer`s. Method-agnostic; `registry.adapter` makes one subclass a method."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, warn_once
from loratlas.engine.layer import BASE, AtlasLayer
from loratlas.engine.loading import place
from loratlas.engine.method import Method
from loratlas.engine.ops import kind_of
from loratlas.engine.sharded import is_sharded
from loratlas.engine.shared import Shared, containers, for_file, from_file
from loratlas.errors import UserError


class NoTargets(UserError, NoMatchingPeftModuleError):
    """target_modules match nothing; caught as our error and as PEFT's."""


class AtlasModel(BaseTuner):
    """Injects a method's layers. Use it through `peft.get_peft_model(model, config)`."""

    method: ClassVar[Method]
    layer_classes: ClassVar[dict[str, type[AtlasLayer]]]
    tuner_layer_cls = AtlasLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._warned: set[str] = set()
        config: Any = self.peft_config[adapter_name]
        self._refuse_own_names(config)
        if getattr(config, "target_modules", None) == "all-linear":
            self._name_what_all_linear_misses(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError:
            wanted = getattr(config, "target_modules", None)
            names = ", ".join(sorted(wanted)) if isinstance(wanted, set) else wanted
            candidates = ", ".join(self._candidates(model)) or "none"
            raise NoTargets(
                f"target_modules ({names}) match no module of {type(model).__name__} that {self.method.name} can "
                f"adapt; names that it can adapt: {candidates}."
            ) from None
        config.calibration = None  # as large as the adapted weights, and used up

    def _name_what_all_linear_misses(self, model: nn.Module) -> None:
        """Experts kept as one 3-D parameter are no linear layers; silence about them would claim too much."""
        known = (nn.modules.conv._ConvNd, BaseTunerLayer)
        stacked = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if not isinstance(module, known)
            for name, p in module.named_parameters(recurse=False)
            if p.dim() == 3 and p.is_floating_point() and min(p.shape) > 1
        ]
        if stacked:
            warnings.warn(
                f"target_modules='all-linear' does not reach weights stacked in 3-D parameters ({len(stacked)} of "
                "them, "
                f"such as {stacked[0]}): they stay frozen.",
                stacklevel=2,
            )

    def _refuse_own_names(self, config: Any) -> None:
        """PEFT looks for modules_to_save by how a path ends, dots or not, and would wrap our tensors as well."""
        method = self.method
        own = [self.prefix + name for name in (*method.params, *method.buffers, *method.derived)]
        for wanted in getattr(config, "modules_to_save", None) or ():
            if any(name.endswith(wanted) for name in own):
                raise UserError(
                    f"modules_to_save: {wanted!r} is also how a tensor of {method.name} is called; give more of the "
                    f"module's path, such as 'mlp.{wanted}'."
                )

    def _candidates(self, model: nn.Module) -> list[str]:
        quantization = get_quantization_kwargs(self)
        return sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if kind_of(module, quantization) in self.layer_classes
            }
        )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._shared: dict[str, Shared] = containers(atlas_layers(model), self.method)
        self._made_shared: dict[str, Tensor] = {}
        if self.method.overrides("ranks") and not peft_config.initialized:
            pattern = peft_config.rank_pattern
            weights = {
                path: layer.base_matrix
                for path, layer in self._targets(model, peft_config)
                if get_pattern_key(list(pattern), path) not in pattern
            }
            chosen = self.method.ranks(peft_config, weights)
            peft_config.rank_pattern = {**pattern, **{f"^{path}": r for path, r in chosen.items()}}
        if self.method.shared:
            found = self._targets(model, peft_config)
            sizes = [(_rank(peft_config, path, layer), *layer.op.shape[::-1]) for path, layer in found]
            self._made_shared = self.method.make_shared(peft_config, sizes) if sizes else {}

    def _targets(self, model: nn.Module, config: Any) -> Iterator[tuple[str, AtlasLayer]]:
        """(path, layer) of everything that `config` asks to adapt, wrapped for the moment if it is not adapted yet."""
        for path, target in targeted(model, config):
            yield path, target if isinstance(target, AtlasLayer) else self._wrap(target, path)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config: AtlasConfig = peft_config
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), current_key), config.lora_alpha)
        # a layer of another of our methods is wrapped like any other: methods stack
        own = target if isinstance(target, AtlasLayer) and target.method is self.method else None
        is_new, layer = own is None, own if own is not None else self._wrap(target, current_key)
        asked, wanted = _asked_rank(config, current_key), _rank(config, current_key, layer)
        for name, tensor in self._made_shared.items():
            if adapter_name not in layer.store(name):
                layer.store(name).put(adapter_name, tensor)
        try:
            statistics = (config.calibration or {}).get(current_key, {})
            r = layer.update_layer(adapter_name, config, wanted, alpha, statistics)
        except UserError as error:
            raise UserError(f"module {current_key}: {error}") from None
        if r < wanted:
            n_out, n_in = layer.op.shape
            if asked is not None and not self.method.chooses_rank:
                warn_once(
                    f"{self.method.name}: rank {wanted} exceeds the {r} useful directions of {current_key} ({n_out} x "
                    f"{n_in}); this module uses r={r}.",
                    self._warned,
                )
            config.rank_pattern = {f"^{current_key}": r, **config.rank_pattern}
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if is_new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
            layer.keep_on_host()  # PEFT moves every container to the weight's device
        else:
            layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def _wrap(self, target: nn.Module, key: str) -> AtlasLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self)
        kind = kind_of(base, quantization)
        if is_sharded(getattr(base, "weight", None)):
            raise UserError(
                f"module {key} is already sharded (tensor parallel or FSDP): add the adapters first, then shard the "
                "model."
            )
        if kind not in self.layer_classes:
            kinds = ", ".join(self.layer_classes)
            raise UserError(
                f"module {key} is a {type(base).__name__}, which {self.method.name} cannot adapt (it adapts: "
                f"{kinds}): take it out of target_modules or add it to exclude_modules."
            )
        try:
            layer = self.layer_classes[kind](target, quantization)
            layer.path = key
            for name, store in self._shared.items():
                setattr(layer, layer.prefix + name, store)
        except UserError as error:
            raise UserError(f"module {key}: {error}") from None
        layer.set_adapter(self.active_adapters)
        return layer

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's, but all or nothing: when one layer refuses, the others are put back as well."""
        before = [(layer, list(layer.merged_adapters)) for _, layer in atlas_layers(self)]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer, names in before:
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Adapters are born in fp32. autocast_adapter_dtype=False asks for the base's dtype instead; all floating
        # tensors take it together, so that differences between a tensor and its start remain exactly zero.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for _, layer in atlas_layers(self, adapter_name):
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if not autocast_adapter_dtype and dtype is not None and dtype.is_floating_point:
                for name in (*layer.method.params, *layer.buffer_names()):
                    store = layer.store(name)
                    if adapter_name in store and store[adapter_name].is_floating_point():
                        store[adapter_name] = store[adapter_name].to(dtype)
            layer.derive(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names` (one adapter a sample) to every adapted layer for the time of one forward."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for _, layer in atlas_layers(self) for name in layer.adapters()}
        unknown = sorted({name for name in names if name != BASE} - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else names
        handles = []
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") and repeated is not names else None
        inside_encoder = set() if encoder is None else set(encoder.modules())
        for module in self.modules():
            if isinstance(module, (AtlasLayer, AuxiliaryTrainingWrapper)):
                # beam search repeats the samples for the decoder, not for the encoder
                hook = partial(_pass_adapter_names, adapter_names=names if module in inside_encoder else repeated)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """PEFT's selection for the adapter's file; a rank must not write its part of a tensor as if it were all."""
        chosen = super()._get_adapter_state_dict(model, *args, **kwargs)
        if cls.method.shared:
            chosen = for_file(chosen, cls.method, kwargs["config"], cls.prefix, kwargs["adapter_name"])
        shards = [name for name, tensor in chosen.items() if is_sharded(tensor)]
        if shards:
            raise UserError(
                f"{len(shards)} tensors of the adapter are sharded, the first is {shards[0]}: pass save_pretrained "
                "state_dict=loratlas.engine.distributed.whole_state_dict(model), made on every rank; in a Trainer set "
                "state_dict_type: FULL_STATE_DICT in fsdp_config."
            )
        return chosen

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's names for the tensors of the file, once `loading` has found a place for each."""
        mapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        layers = list(atlas_layers(model, adapter_name))
        shared = from_file(layers, adapter_name, cls.prefix, mapped)  # type: ignore[arg-type]
        place(layers, adapter_name, cls.prefix, mapped)
        return mapped | shared

    def rename_adapter(self, old: str, new: str) -> None:
        """Give adapter `old` the name `new`, in place: tensors keep their identity, so optimizers stay valid.

        Raises:
            UserError: `old` does not exist, `new` exists, or the adapter is merged.
        """
        if old not in self.peft_config:
            raise UserError(f"there is no adapter {old!r}; adapters: {', '.join(self.peft_config)}.")
        if new in self.peft_config or "." in new or not new:
            raise UserError(f"{new!r} is taken or not a valid adapter name (no dots, not empty).")
        layers = [layer for _, layer in atlas_layers(self, old)]
        if any(old in layer.merged_adapters for layer in layers):
            raise UserError(f"adapter {old!r} is merged: call unmerge_adapter() before renaming it.")
        # PeftModel and the wrapped model share this dictionary
        self.peft_config[new] = self.peft_config.pop(old)
        holders = [getattr(layer, n) for layer in layers for n in layer.adapter_layer_names + layer.other_param_names]
        for module in self.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and old in getattr(module, "modules_to_save", {}):
                holders.append(module.modules_to_save)
                module._adapters = {new if name == old else name for name in module._adapters}
                module._active_adapter = [new if name == old else name for name in module.active_adapters]
        for holder in holders:
            if old in holder:
                value = holder[old]
                del holder[old]
                holder[new] = value
        for layer in layers:
            layer._active_adapter = [new if name == old else name for name in layer.active_adapters]
        self.active_adapter = [new if name == old else name for name in self.active_adapters]


def atlas_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, AtlasLayer]]:
    """(module path, layer) of every adapted layer, of those that carry `adapter` if one is named."""
    for path, module in model.named_modules():
        if isinstance(module, AtlasLayer) and (adapter is None or adapter in module.adapters()):
            yield path, module


def _asked_rank(config: AtlasConfig, path: str) -> int | None:
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)


def _rank(config: AtlasConfig, path: str, layer: AtlasLayer) -> int:
    """The rank that the config asks for in a layer; all of it where that is left open."""
    asked = _asked_rank(config, path)
    return min(layer.op.shape) if asked is None else asked


def targeted(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything that `config` asks to adapt, as PEFT will find it."""
    wanted = _maybe_include_all_linear_layers(copy.copy(config), model)
    adapted = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    for path, module in model.named_modules():
        if path and not path.startswith(adapted) and check_target_module_exists(wanted, path):
            yield path, module


def _pass_adapter_names(target: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> tuple[Any, Any]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
