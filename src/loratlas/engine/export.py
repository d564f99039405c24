"""Shipping an adapter: as a plain LoRA that stock PEFT and servers load without this library, or as merged weights.

The plain LoRA has one rank for all modules, padded with zeros to one that servers have kernels for, lora_alpha = r and
the scaling folded into B, because servers read no more than that of PEFT's config. Without `rank` it is exact: the
low-rank methods hand out their own factors.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from loratlas.engine.folder import PREFIX
from loratlas.engine.layer import AtlasLayer
from loratlas.engine.lora_form import LoraForm, lora_form, total_error
from loratlas.engine.model import atlas_layers
from loratlas.engine.nested import at_most
from loratlas.engine.reload import Verification, base_modules, verify_reload
from loratlas.engine.serving import (
    COMPONENTS,
    DIFFUSERS_WEIGHTS_NAME,
    SERVERS,
    max_lora_rank,
    padded_rank,
    require_accepted,
)
from loratlas.errors import UserError
from loratlas.files import whole_directory, write_json

HEAD = "head"  # folder beside the LoRA's files for what `heads="beside"` takes out of them
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# tasks whose classes in PEFT look for a head in the adapter, whatever its config says
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        kind: "lora" or "merged"; of merged weights only `directory` and `tensors` say anything.
        rank: largest rank of a module's update, as exported. exact_rank: what it takes to cut nothing.
        padded_rank: rank of every tensor in the file, r of its config; 0 where each module has its own.
        max_lora_rank: what vLLM must be told to accept; None if it does not serve such a file.
        relative_error: ||delta - exported||_F / ||delta||_F over all modules, of cutting and of rounding to `dtype`; 0
            when neither changed anything.
        heads: modules saved whole that went into the folder `head`.
        verification: how it came out of a clean process, None if that was not asked for.
        remarks: sentences that the user of the folder should know.
    """

    directory: str
    kind: str
    tensors: int
    rank: int = 0
    exact_rank: int = 0
    padded_rank: int = 0
    max_lora_rank: int | None = 0
    relative_error: float = 0.0
    dtype: str = ""
    heads: tuple[str, ...] = ()
    verification: Verification | None = None
    remarks: tuple[str, ...] = ()


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    ranks: str = "one",
    heads: str = "inside",
    component: str | None = None,
    check: str | None = None,
    verify: bool = False,
) -> ExportReport:
    """Write adapter `adapter_name` of `model` as a plain PEFT LoRA folder.

    The folder takes `directory`'s place only when everything has passed; until then what is there stays.

    Args:
        rank: largest rank; None means exact. A smaller one takes the best approximation of each module's update, or the
            adapter at that rank where the method has trained it for all (`nested`), which is exact.
        dtype: dtype of the factors in the file; the error of rounding is part of the report.
        ranks: "one" rank for all modules, padded with zeros, as servers want it; or "each" module its own, in the
            config's rank_pattern: the smaller file for stock PEFT where training chose the ranks. Modules without any
            rank are left out then.
        heads: modules saved whole (a classifier head) "inside" the adapter's file, as PEFT loads them, or "beside" it
            in the folder `head`, because servers take none: `base.load_state_dict(..., strict=False)` puts them back.
        component: for diffusers, the pipeline's component that `model` is ("unet", "transformer", ...): writes
            pytorch_lora_weights.safetensors too, which `pipeline.load_lora_weights` reads.
        check: "vllm", "sglang" or "diffusers": refuse to write what that server would not serve.
        verify: load the folder with stock PEFT in a process without this library and compare (see `verify_reload`).

    Raises:
        UserError: the model has no such adapter, the method has no LoRA form, numbers that `dtype` cannot hold, heads
            or biases that have no place, a failed check or verification, or `directory` is a file.
    """
    _check_options(rank, dtype, ranks, heads, component, check)
    with at_most(model, rank, adapter_name):
        return _export_lora(model, directory, adapter_name, rank, dtype, ranks, heads, component, check, verify)


def _export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str,
    rank: int | None,
    dtype: torch.dtype,
    ranks: str,
    heads: str,
    component: str | None,
    check: str | None,
    verify: bool,
) -> ExportReport:
    forms = {path: lora_form(path, layer, adapter_name, rank, dtype) for path, layer in _layers(model, adapter_name)}
    if ranks == "each":
        forms = {path: form for path, form in forms.items() if form.rank} or dict(itertools.islice(forms.items(), 1))
    others = {name: _for_file(tensor) for name, tensor in _other_tensors(model, adapter_name).items()}
    beside = heads == "beside" and bool(others)
    if beside and model.peft_config[adapter_name].bias != "none":  # type: ignore[index, union-attr]
        raise UserError(
            f"adapter {adapter_name!r} has trained biases, which have no place in a served LoRA: export merged "
            "weights, or heads='inside' for stock PEFT."
        )
    largest = max(1, *(form.rank for form in forms.values()))
    widths = {path: max(1, form.rank) if ranks == "each" else padded_rank(largest) for path, form in forms.items()}
    width = max(widths.values())
    biased = any(form.bias is not None for form in forms.values())
    tensors = {
        f"{PREFIX}{path}.{name}": _for_file(tensor)
        for path, form in forms.items()
        for name, tensor in form.tensors(path, widths[path], biased=biased).items()
    }
    inside = {} if beside else others
    names = _saved_modules(model, adapter_name)
    verification = None
    with whole_directory(directory) as folder:
        _save(tensors | inside, folder / SAFETENSORS_WEIGHTS_NAME)
        config = _lora_config(model, adapter_name, forms, widths, headless=beside, biased=biased)
        config.save_pretrained(str(folder))
        if component is not None:
            renamed = {f"{component}.{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
            _save(renamed, folder / DIFFUSERS_WEIGHTS_NAME)
        head = _save_head(others, names, folder / HEAD) if beside else None
        if check is not None:
            require_accepted(folder, check)
        if verify:
            assert isinstance(model, PeftModel)  # _layers has seen to that
            verification = verify_reload(folder, model, adapter_name, forms, head)
    return ExportReport(
        directory=str(directory),
        kind="lora",
        tensors=len(tensors) + len(others),
        rank=largest,
        exact_rank=max(form.exact_rank for form in forms.values()),
        padded_rank=0 if ranks == "each" else width,
        max_lora_rank=None if ranks == "each" else max_lora_rank(width),
        relative_error=total_error(forms.values()),
        dtype=str(dtype).removeprefix("torch."),
        heads=names if beside else (),
        verification=verification,
        remarks=_remarks(0 if ranks == "each" else width, names if inside else (), biased=biased),
    )


def export_merged(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> ExportReport:
    """Write the base model with the adapter merged into a copy of its weights; `model` itself is not touched.

    Raises:
        UserError: no such adapter, a quantised base (load it in full precision to merge), or `directory` is a file.
    """
    layers = dict(_layers(model, adapter_name))
    quantised = [path for path, layer in layers.items() if layer.quantization_backend is not None]
    if quantised:
        raise UserError(
            f"{quantised[0]} is quantised, and merging into quantised weights loses accuracy: load the base model in "
            "full precision (bfloat16 or float32), load the adapter on it, and export that."
        )
    if hasattr(model.base_model.model, "save_pretrained"):  # type: ignore[union-attr]
        _refuse_new_biases(layers, adapter_name)
    twin: Any = copy.deepcopy(model)
    twin.set_adapter(adapter_name)  # takes out what is merged, and brings the adapter's own modules_to_save
    merged: Any = twin.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    with whole_directory(directory) as folder:
        if hasattr(merged, "save_pretrained"):
            merged.save_pretrained(folder)
        else:
            tensors = {name: _for_file(tensor) for name, tensor in merged.state_dict().items()}
            _save(tensors, Path(folder) / "model.safetensors")
    return ExportReport(str(directory), "merged", len(merged.state_dict()))


def _refuse_new_biases(layers: Mapping[str, AtlasLayer], adapter: str) -> None:
    """A transformers model is built anew by its configuration, and would drop a bias that this does not know of."""
    for path, layer in layers.items():
        if layer.bias_delta([adapter]) is not None and layer.base_bias() is None:
            raise UserError(
                f"{path} has no bias, but the adapter adds one, which the saved model would lose on loading: train the "
                "adapter without biases of its own, or use merge_and_unload() and keep the model in memory."
            )


def _check_options(
    rank: int | None, dtype: torch.dtype, ranks: str, heads: str, component: str | None, check: str | None
) -> None:
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, but it is {rank}.")
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(map(str, DTYPES))}, but it is {dtype}.")
    if ranks not in ("one", "each"):
        raise UserError(f"ranks must be 'one' or 'each', but it is {ranks!r}.")
    if ranks == "each" and (check is not None or component is not None):
        raise UserError("ranks='each' is for stock PEFT: servers and diffusers want one rank.")
    if heads not in ("inside", "beside"):
        raise UserError(f"heads must be 'inside' or 'beside', but it is {heads!r}.")
    if component is not None and component not in COMPONENTS:
        raise UserError(f"component must be one of {', '.join(COMPONENTS)}, but it is {component!r}.")
    if check is not None and check not in SERVERS:
        raise UserError(f"check must be one of {', '.join(SERVERS)}, but it is {check!r}.")


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, AtlasLayer]]:
    """(path in the base model, layer) of every module that carries `adapter`."""
    if not isinstance(model, PeftModel) or adapter not in model.peft_config:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise UserError(f"the model has no adapter {adapter!r} (adapters: {known}).")
    found = list(atlas_layers(model, adapter))
    if not found:
        raise UserError(
            f"adapter {adapter!r} is a {model.peft_config[adapter].peft_type} adapter of PEFT, not one of ours: it is "
            "already in its own format."
        )
    for path, layer in found:
        yield path.removeprefix(PREFIX), layer


def _other_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What the adapter's file holds beside our tensors: modules_to_save and trained biases."""
    prefixes = {layer.prefix for _, layer in atlas_layers(model, adapter)}
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: value for name, value in state.items() if not any(f".{prefix}" in name for prefix in prefixes)}


def _saved_modules(model: nn.Module, adapter: str) -> tuple[str, ...]:
    """Paths of the modules that are saved whole for `adapter`."""
    return tuple(
        path.removeprefix(PREFIX)
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters
    )


def _save_head(tensors: Mapping[str, Tensor], modules: tuple[str, ...], folder: Path) -> Path:
    """The file of the modules saved whole, under their names in the base model; a note beside says what they are."""
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    folder.mkdir()
    write_json(folder / "head.json", {"modules": list(modules), "tensors": sorted(named)})
    _save(named, folder / "model.safetensors")
    return folder / "model.safetensors"


def _lora_config(
    model: Any,
    adapter: str,
    forms: Mapping[str, LoraForm],
    widths: Mapping[str, int],
    *,
    headless: bool,
    biased: bool,
) -> LoraConfig:
    ours: Any = model.peft_config[adapter]
    targets, rank = sorted(forms), max(widths.values())
    pattern = {f"^{path}": width for path, width in widths.items() if width != rank}
    # PEFT matches names by their end: keep modules away that merely end like one of ours
    ends = tuple(f".{target}" for target in targets)
    others = sorted(path for path, _ in base_modules(model) if path not in forms and path.endswith(ends))
    # PEFT appends the names of classifiers at every loading
    saved = None if headless else list(dict.fromkeys(ours.modules_to_save or ())) or None
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets,
        exclude_modules=others or None,
        modules_to_save=saved,
        lora_bias=biased,
        bias="lora_only" if ours.bias == "atlas_only" else ours.bias,
        fan_in_fan_out=all(form.layer.op.kind == "conv1d" for form in forms.values()),
        task_type=None if headless and ours.task_type in _TASKS_WITH_HEAD else ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
    )


def _remarks(width: int, inside: tuple[str, ...], *, biased: bool) -> tuple[str, ...]:
    said = []
    if width == 0:
        said.append("Every module has a rank of its own (rank_pattern): stock PEFT loads that, servers do not.")
    elif max_lora_rank(width) is None:
        said.append(
            f"vLLM refuses rank {width}: it serves 512 at most, so give a smaller rank or export merged weights."
        )
    if inside:
        said.append(
            f"The file holds {', '.join(inside)} as well: stock PEFT loads that, servers do not (--heads beside)."
        )
    if biased:
        said.append("The file holds biases (lora_bias): stock PEFT adds them, servers refuse them.")
    return tuple(said)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def _for_file(tensor: Tensor) -> Tensor:
    """Detached, on the CPU, with storage of its own: safetensors refuses views and shared memory."""
    return tensor.detach().cpu().clone().contiguous()
