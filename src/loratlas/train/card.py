"""The model card of a trained adapter or model: the README.md that the hub shows, in place of PEFT's empty form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from loratlas.train import demo

if TYPE_CHECKING:
    from loratlas.catalog import System
    from loratlas.train.data import TaskData
    from loratlas.train.results import RunResult
    from loratlas.train.roles import Cast, Member

_PIPELINES = {
    "text-classification": "text-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
}
_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
}

_LOAD = 'from_pretrained("path/to/this/folder")'


def model_card(result: RunResult, cast: Cast, task: TaskData) -> str:
    """Front matter that the hub accepts, then what was trained and how, what it reached, how to load and ship it."""
    base = _hub_id(result, task)
    data = _dataset(task)
    front = ModelCardData(
        base_model=base,
        library_name="peft" if cast.adapter else "transformers",
        pipeline_tag=_PIPELINES.get(task.task),
        datasets=[data] if data else None,
        metrics=[_hub_metric(result.metric)],
        tags=[*(["peft"] if cast.adapter else []), "loratlas", *(each.system.slug for each in cast.members)],
    )
    parts = (_heading(result, cast, base), _results(result), _use(result, cast, task, base), _training(result))
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _heading(result: RunResult, cast: Cast, base: str | None) -> str:
    kind = "adapter of" if cast.adapter else "fine-tuning of"
    model = f"[{base}](https://huggingface.co/{base})" if base else f"`{result.model}`"
    return (
        f"# {result.label} {kind} {(base or Path(result.model).name)}\n\n"
        + "".join(f"{_introduced(each)}\n\n" for each in cast.members)
        + f"- Base model: {model}\n"
        f"- Data: {result.task}\n"
        f"- Trained: {result.trainable_parameters:,} of {result.total_parameters:,} parameters{_in_use(result)}"
        + (f"\n- Classes: {_classes(result.labels)}" if result.labels else "")
    )


def _in_use(result: RunResult) -> str:
    used = result.used_parameters
    return "" if used is None else f", room included; the ranks in use at the end are {used:,}"


def _introduced(member: Member) -> str:
    system, role = member.system, member.field.capitalize()
    return f"{system.summary} {role}: [{system.name}, arXiv {system.paper}](https://arxiv.org/abs/{system.paper})."


def _results(result: RunResult) -> str:
    last = result.evals[-1]
    measured = {name: value for name, value in last.items() if name not in ("step", "eval_loss")}
    rows = "\n".join(f"| {name} | {_number(value)} |" for name, value in measured.items())
    note = (
        f"\n\nThe run diverged at step {result.diverged_at}; this is the state after the step before."
        if result.diverged_at is not None
        else ""
    )
    return (
        f"## Results\n\nOn the test rows after step {last['step']:.0f}:\n\n| metric | value |\n|---|---|\n{rows}{note}"
    )


def _use(result: RunResult, cast: Cast, task: TaskData, base: str | None) -> str:
    if cast.adapter is None:
        return _code(f"from transformers import {(name := _CLASSES[task.task])}", "", f"model = {name}.{_LOAD}")
    system = cast.adapter.system
    labels = f", num_labels={task.num_labels}" if task.task != "causal-lm" else ""
    ours = system.entry.startswith("loratlas.")
    cls = _CLASSES[task.task]
    lines = [
        *(["import loratlas  # makes the method known to PEFT (pip install loratlas)"] if ours else []),
        "from peft import PeftModel",
        f"from transformers import {cls}",
        "",
        f'base = {cls}.from_pretrained("{base or result.model}"{labels})',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]
    return _code(*lines) + (_ship(result, system) if ours else "")


def _code(*lines: str) -> str:
    return "## Use it\n\n```python\n" + "\n".join(lines) + "\n```"


def _ship(result: RunResult, system: System) -> str:
    command = "loratlas export path/to/this/folder"
    lines = [f"{command} --to merged --out model    # the whole model"]
    if result.export_rank is not None and "lora" in system.exports:
        lines.insert(0, f"{command} --to lora --out lora       # a plain LoRA, exact with rank {result.export_rank}")
    return "\n\nAn export needs no LoRAtlas:\n\n```bash\n" + "\n".join(lines) + "\n```"


def _training(result: RunResult) -> str:
    options = [] if result.model_dir else [_listed(result.options) or "the method's defaults"]
    options += [f"of {slug}: {_listed(values)}" for slug, values in result.parts.items() if values]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"## Training\n\n{result.steps} steps of {result.batch_size} rows, learning rate {result.learning_rate:g}, "
        f"seed {result.seed}; options: {'; '.join(options)}.\n\nVersions: {versions}."
    )


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in options.items())


def _hub_id(result: RunResult, task: TaskData) -> str | None:
    """The hub's name of the base model; None for a folder, which the hub would refuse."""
    if task.work is not None and task.work.model is None:
        return demo.HUB_ID
    return None if Path(result.model).exists() else result.model


def _dataset(task: TaskData) -> str | None:
    name = task.work.data if task.work is not None else None
    return None if name is None or Path(name).exists() else name.partition(":")[0]


def _hub_metric(metric: str) -> str:
    return {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}.get(metric, metric)


def _classes(labels: list[str]) -> str:
    shown = ", ".join(labels[:12])
    return shown if len(labels) <= 12 else f"{shown} and {len(labels) - 12} more"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"
