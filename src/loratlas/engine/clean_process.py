"""What runs in the clean process of `reload`: stock PEFT and transformers, and nothing of this library.

A copy of this file is run in the folder of a job (see `reload`), so it imports nothing of ours.

    job.json              the adapter's folder, the modules of the model, how to load the base if there is a way
    probe.safetensors     inputs: "x.<path>" for single layers, "in.<name>" for the whole model
    result.safetensors    written here: "y.<path>" for single layers, "out" for the whole model
    result.json           written here: why the whole model could not be loaded, if it could not
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."


def main(job_folder: str) -> None:
    folder = Path(job_folder)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    probe = load_file(folder / "probe.safetensors")
    inputs = {name.removeprefix("x."): x for name, x in probe.items() if name.startswith("x.")}
    results = layer_outputs(Path(job["adapter"]), job["modules"], inputs)
    reason = ""
    if job["base"] is not None:
        try:
            base = load_base(job["base"], folder / "config")
        except (OSError, ValueError) as error:  # not in the cache, moved away, a class that needs more
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        else:
            whole = {name.removeprefix("in."): x for name, x in probe.items() if name.startswith("in.")}
            results["out"] = model_output(base, job, whole)
    own = sorted(name for name in sys.modules if name.partition(".")[0] == "loratlas")
    if own:
        raise SystemExit(f"the process is not clean: {own[0]} was imported")
    save_file(results, folder / "result.safetensors")
    (folder / "result.json").write_text(json.dumps({"reason": reason}), encoding="utf-8")


def layer_outputs(adapter: Path, modules: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"y.<path>": output} of PEFT's LoRA on a model of the same names and shapes whose own weights are zero."""
    config = LoraConfig.from_pretrained(str(adapter))
    # heads and biases belong to the real model
    config.task_type, config.modules_to_save, config.bias = None, None, "none"
    model = PeftModel(stand_in(modules), config).eval()
    tensors = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    outcome: Any = set_peft_model_state_dict(model, lora)
    surplus = outcome.unexpected_keys
    if surplus:
        raise SystemExit(f"PEFT finds no place for {len(surplus)} tensors, the first is {surplus[0]}")
    layers: dict[str, Any] = {
        path.removeprefix(PREFIX): m for path, m in model.named_modules() if isinstance(m, LoraLayer)
    }
    if set(layers) != set(inputs):
        wrong = sorted(set(layers) ^ set(inputs))
        raise SystemExit(f"PEFT adapts other modules than the export holds, the first is {wrong[0]}")
    with torch.no_grad():
        return {f"y.{path}": layers[path](x).contiguous() for path, x in inputs.items()}


def stand_in(modules: dict[str, Any]) -> nn.Module:
    """A model with the given modules, {path: [kind, arguments]}; one stored number serves as each weight."""
    root = nn.Module()
    for path, (kind, arguments) in sorted(modules.items()):
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place._modules[parent]  # type: ignore[assignment]
        if name not in place._modules:
            place.add_module(name, _zero_layer(kind, arguments))
    return root


def _zero_layer(kind: str, arguments: dict[str, Any]) -> nn.Module:
    scale = arguments.pop("embed_scale", None)
    makers: dict[str, Any] = {
        "linear": nn.Linear,
        "conv1d": Conv1D,
        "conv2d": nn.Conv2d,
        "embedding": nn.Embedding,
        "other": nn.Module,
    }
    with torch.device("meta"):
        layer = makers[kind](**arguments)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    if scale is not None:
        layer.embed_scale = scale
    return layer


def load_base(recipe: dict[str, Any], config_folder: Path) -> nn.Module:
    cls = getattr(transformers, recipe["class"])
    config = cls.config_class.from_pretrained(str(config_folder))
    dtype = getattr(torch, recipe["dtype"])
    return cls.from_pretrained(recipe["path"], config=config, revision=recipe["revision"], dtype=dtype)


def model_output(base: nn.Module, job: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    """The output of the base with the exported folder on it, put together as a user would."""
    if job["head"] is not None:
        unknown = base.load_state_dict(load_file(job["head"]), strict=False).unexpected_keys
        if unknown:
            raise SystemExit(f"the base model has no place for the head's tensor {unknown[0]}")
    with warnings.catch_warnings():
        # all that PEFT says when a file does not fit the model
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(base, job["adapter"]).eval()
    with torch.no_grad():
        return first_tensor(model(**inputs)).float().contiguous()


def first_tensor(output: Any) -> Tensor:
    """The first floating-point tensor of a model's output (logits before hidden states)."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


if __name__ == "__main__":
    main(sys.argv[1])
