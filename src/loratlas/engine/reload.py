"""An exported LoRA put to the test: loaded by stock PEFT in a process that knows nothing of this library.

Two comparisons on seeded random inputs. Every layer alone, in float32 and without the base's weights: PEFT must compute
what was exported, under the right names. And the whole model, where its base can be loaded again from where it came:
base + exported must give the outputs of base + ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratlas.engine import clean_process
from loratlas.engine.lora_form import LoraForm
from loratlas.engine.method import View
from loratlas.errors import UserError

_TOLERANCE = 1e-3  # relative; in float32 rounding stays far below, a wrong scale or factor far above
# of outputs in the base's own dtype, whose rounding differs between the two ways of adding an update
_HALF_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TOKENS = 16


@dataclass(frozen=True)
class Verification:
    """How an exported LoRA came out of a clean process.

    Attributes:
        layers: how many layers were compared: all of the adapter.
        layer_difference: the largest ||y_peft - y_export|| / ||y_export|| among them.
        output_difference: ||y_peft - y_ours|| / ||y_ours|| of the whole model's output, None if it was not compared. Of
            an export that was cut or rounded it says what that does to the output, and is not an error.
        output_max: the largest |y_peft - y_ours|.
        remark: why the outputs were not compared; empty if they were.
    """

    layers: int
    layer_difference: float
    output_difference: float | None = None
    output_max: float | None = None
    remark: str = ""


def verify_reload(
    folder: Path, model: PeftModel, adapter: str, forms: Mapping[str, LoraForm], head: Path | None = None
) -> Verification:
    """Load the LoRA in `folder` with stock PEFT in a clean process and compare it with `adapter` of `model`.

    Args:
        forms: what was exported, by module path.
        head: file with the modules saved whole, if they are not in the folder's own file.

    Raises:
        UserError: PEFT does not load the folder or computes something else. Tolerances are relative: 1e-3 in float32,
            for outputs of a base in float16 2e-2, in bfloat16 1e-1; no limit for outputs of what was cut or rounded.
    """
    exact = all(form.gap == 0.0 for form in forms.values())
    base: Any = model.get_base_model()
    remark = _no_outputs(model, adapter)
    inputs = None if remark else _model_inputs(base)
    if not remark and inputs is None:
        remark = f"no inputs can be made up for a {type(base).__name__}"
    probe = {f"x.{path}": _layer_input(form) for path, form in forms.items()}
    ours = None
    with _evaluating(model), torch.no_grad():
        expected = {path: _branch(form, adapter, probe[f"x.{path}"], exact) for path, form in forms.items()}
        if inputs is not None:
            probe |= {f"in.{name}": x for name, x in inputs.items()}
            ours = clean_process.first_tensor(model(**{name: x.to(base.device) for name, x in inputs.items()}))
    job = {
        "adapter": str(folder.resolve()),
        "head": None if head is None else str(head.resolve()),
        "modules": _modules(model, forms),
        "base": None if ours is None else _recipe(model, adapter),
    }
    results, reason = _run(job, probe, None if ours is None else base.config)
    worst = max(_compare(path, results[f"y.{path}"], y) for path, y in expected.items())
    if ours is None or "out" not in results:
        return Verification(len(forms), worst, remark=remark or f"its base could not be loaded again ({reason})")
    gap, size = results["out"] - ours.float().cpu(), float(ours.float().norm())
    relative = float(gap.norm()) / size if size else float(gap.norm())
    limit = _HALF_TOLERANCE.get(ours.dtype, _TOLERANCE)
    if exact and not relative <= limit:
        raise UserError(
            f"stock PEFT gives other outputs with the export than the model in memory (relative difference "
            f"{relative:.1e}, allowed are {limit:.0e}), so it was not written: are the base's weights, or a head that "
            f"the adapter does not save, different from those in {model.peft_config[adapter].base_model_name_or_path}?"
        )
    return Verification(len(forms), worst, relative, float(gap.abs().max()))


def base_modules(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model as it is without adapters."""
    return _walk("", model.get_base_model())


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        yield path, module.get_base_layer()
        return
    yield path, module
    for name, child in module.named_children():
        yield from _walk(f"{path}.{name}".lstrip("."), child)


def _modules(model: PeftModel, forms: Mapping[str, LoraForm]) -> dict[str, Any]:
    """{path: [kind, arguments]} for `clean_process.stand_in`; what was not adapted has a name only."""
    return {
        path: [forms[path].layer.op.kind, _arguments(forms[path], module)] if path in forms else ["other", {}]
        for path, module in base_modules(model)
        if path
    }


def _arguments(form: LoraForm, module: Any) -> dict[str, Any]:
    n_out, n_in = form.layer.op.shape
    kind = form.layer.op.kind
    if kind == "conv1d":
        return {"nf": n_out, "nx": n_in}
    if kind == "conv2d":
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        return {**{name: getattr(module, name) for name in names}, "bias": False}
    if kind == "embedding":
        scale = getattr(module, "embed_scale", None)
        extra = {} if scale is None else {"embed_scale": float(scale)}
        return {"num_embeddings": n_in, "embedding_dim": n_out, "padding_idx": module.padding_idx, **extra}
    return {"in_features": n_in, "out_features": n_out, "bias": False}


def _layer_input(form: LoraForm) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    n_in, base = form.layer.op.shape[1], form.layer.get_base_layer()
    if form.layer.op.kind == "embedding":
        return torch.randint(0, n_in, (8,), generator=generator)
    if form.layer.op.kind == "conv2d":
        assert isinstance(base, nn.Conv2d)
        return torch.randn(1, base.in_channels, *(side + 7 for side in base.kernel_size), generator=generator)
    return torch.randn(4, n_in, generator=generator)


def _branch(form: LoraForm, adapter: str, x: Tensor, exact: bool) -> Tensor:
    """What the layer adds to the base's output: by the method itself, or by what was left of it in the export."""
    layer = form.layer
    x = x.to(form.down.device)
    if exact:
        return layer.method.delta(View(layer, adapter), x).cpu()
    y = layer.op.low_rank(x, form.down.float(), form.up.float())
    return (y if form.bias is None else y + form.bias.float()).cpu()


def _no_outputs(model: PeftModel, adapter: str) -> str:
    """Why the whole model cannot be compared; empty if it can."""
    base: Any = model.get_base_model()
    if not isinstance(base, PreTrainedModel) or getattr(transformers, type(base).__name__, None) is not type(base):
        return f"{type(base).__name__} is not a class of transformers"
    if getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None:
        return "the base is quantised"
    if not model.peft_config[adapter].base_model_name_or_path:
        return "the adapter does not say where its base model comes from"
    merged = [name for module in model.modules() for name in getattr(module, "merged_adapters", ())]
    if model.active_adapters != [adapter] or set(merged) - {adapter}:
        return f"{adapter!r} is not the one active adapter of the model"
    return ""


def _recipe(model: PeftModel, adapter: str) -> dict[str, Any]:
    base: Any = model.get_base_model()
    config = model.peft_config[adapter]
    return {
        "class": type(base).__name__,
        "path": config.base_model_name_or_path,
        "revision": config.revision,
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def _model_inputs(base: Any) -> dict[str, Tensor] | None:
    """Random tokens or pixels for a transformers model; None for one that takes something else."""
    config, generator = base.config, torch.Generator().manual_seed(0)
    if base.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64  # convolutional networks take any
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), *sides)
        return {"pixel_values": torch.randn(shape, generator=generator).to(base.dtype)}
    if base.main_input_name != "input_ids":
        return None
    text = config.get_text_config()
    # some models count positions from an offset
    length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or 2 * _TOKENS) // 2 * 2
    ids = torch.randint(0, text.vocab_size, (1, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids.clone()} if config.is_encoder_decoder else inputs


def _run(job: dict[str, Any], probe: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], str]:
    """(results, why the base was not loaded) of the clean process."""
    # what the base needs has been loaded before; the accelerator may be full with it
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="loratlas-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        save_file(probe, folder / "probe.safetensors")
        if config is not None:
            config.save_pretrained(folder / "config")
        # a script finds its neighbours before the libraries: in this folder it has none
        script = shutil.copy(clean_process.__file__, folder)
        words = [sys.executable, str(script), str(folder)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"stock PEFT does not load the export, so it was not written: {last}")
        reason = json.loads((folder / "result.json").read_text(encoding="utf-8"))["reason"]
        return load_file(folder / "result.safetensors"), reason


def _compare(path: str, got: Tensor, expected: Tensor) -> float:
    gap, size = float((got.float() - expected.float()).norm()), float(expected.float().norm())
    relative = gap / size if size else gap
    if not relative <= _HALF_TOLERANCE.get(expected.dtype, _TOLERANCE):
        raise UserError(
            f"module {path}: stock PEFT computes something else from the export than the adapter does (relative "
            f"difference {relative:.1e}), so it was not written."
        )
    return relative


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
