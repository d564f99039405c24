"""`Recipe`: everything that a run is, except where it is written, under the names of the command line's options.

A recipe is read from YAML (`recipe_file`), made from the command line, or both; `recipe_check` finds all that is wrong
with its values at once. Nothing heavy is imported here, so that a mistake is told without waiting for torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratlas.train.tasks import METRICS, TASKS

if TYPE_CHECKING:
    from loratlas.train.spec import RunSpec
    from loratlas.train.work import Work

DEMO = "demo"  # the model or data that come with the package; a folder of that name is ./demo
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
PARTS = ("optimizer", "objective", "strategy")  # what may stand beside an adapter
OPTION_MAPS = {"method": "options", **{kind: f"{kind}_options" for kind in PARTS}}
REQUIRED: Any = dataclasses.MISSING
_METRICS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))


def _item(default: Any, help: str, section: str = "Training", **limits: Any) -> Any:
    """A field with its help and its limits: least (>=), above (>), most (<=), choices."""
    metadata = {"help": help, "section": section, **limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """One run. `work` and `spec` turn it into what `train.run.run` takes."""

    method: str = _item(REQUIRED, "A slug of `loratlas methods`, or lora, pissa, peft-lora.", "Method")
    model: str = _item(
        REQUIRED, "Base model: hub id or folder; demo: the small encoder of the extra `demo`.", "Model and data"
    )
    data: str = _item(
        REQUIRED,
        "A file, a folder, a hub dataset as NAME or NAME:CONFIG; demo: docstrings of Python's standard library.",
        "Model and data",
    )
    test: str | None = _item(
        None, "Test rows: a file or a split's name; null: a validation or test split, or a tenth.", "Model and data"
    )
    forget: str | None = _item(
        None,
        "Rows to forget, beside those of data, for objectives that unlearn: a file, a folder, a hub dataset.",
        "Model and data",
    )
    task: str | None = _item(None, f"{', '.join(TASKS)}; null: read off the columns.", "Model and data", choices=TASKS)
    text_columns: tuple[str, ...] = _item(
        (), "Column with the text, two for pairs; none: found by name.", "Model and data"
    )
    label_column: str | None = _item(None, "Column with the label; null: found by name.", "Model and data")
    metric: str | None = _item(
        None,
        f"{', '.join(_METRICS)}; null: the first of the task.",
        "Model and data",
        choices=_METRICS,
    )
    max_length: int | None = _item(
        None, "Longest text in tokens; null: 128, for the demo's texts 48.", "Model and data", least=1
    )
    limit: int | None = _item(None, "Use only so many rows of each part; null: all.", "Model and data", least=1)
    optimizer: str | None = _item(
        None, "A slug of kind optimizer; null: AdamW, or the method where it is one.", "Parts beside the method"
    )
    objective: str | None = _item(
        None, "A slug of kind objective; null: the task's own loss.", "Parts beside the method"
    )
    strategy: str | None = _item(
        None, "A slug of kind strategy; null: all that can train trains at every step.", "Parts beside the method"
    )
    seed: int = _item(0, "Seed of everything random.", least=0)
    steps: int = _item(150, "Optimizer steps.", least=1)
    batch_size: int = _item(32, "Rows in a batch.", least=1)
    gradient_accumulation: int = _item(1, "Batches to an optimizer step.", least=1)
    learning_rate: float | None = _item(None, "Peak learning rate; null: the catalogue's.", above=0.0)
    lr_scheduler: str = _item("linear", f"{', '.join(SCHEDULERS)}.", choices=SCHEDULERS)
    warmup: float = _item(0.06, "Share of the steps in which the learning rate rises.", least=0.0, most=1.0)
    weight_decay: float = _item(0.0, "The optimizer's; it pulls what trains towards zero.", least=0.0)
    max_grad_norm: float = _item(1.0, "Longer gradients are cut to this norm.", above=0.0)
    bf16: bool = _item(False, "Mixed precision with bfloat16.")
    group_by_length: bool = _item(False, "Texts of like lengths share a batch: less padding, other batches.")
    eval_every: int | None = _item(None, "Steps between evaluations; null: a fifth of the steps.", least=1)
    save_every: int | None = _item(None, "Steps between checkpoints to resume from; null: none.", least=1)
    calibrate_steps: int = _item(
        8, "Batches to look at before training, for methods whose start follows the data.", least=1
    )
    report_to: tuple[str, ...] = _item((), "Where the Trainer reports as well: tensorboard, wandb, ...")
    options: dict[str, Any] = field(default_factory=dict, metadata={"section": "Options"})
    optimizer_options: dict[str, Any] = field(default_factory=dict, metadata={"section": "Options"})
    objective_options: dict[str, Any] = field(default_factory=dict, metadata={"section": "Options"})
    strategy_options: dict[str, Any] = field(default_factory=dict, metadata={"section": "Options"})

    def work(self) -> Work:
        """The model and data by name; nothing is loaded yet."""
        from loratlas.train.work import Work

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Work)}
        demos = {name: None for name in ("model", "data") if values[name] == DEMO}
        return Work(**values | demos)

    def spec(self, output_dir: str, model: str) -> RunSpec:
        """The training, written to `output_dir`; model: what `work().base` says."""
        from loratlas.train.spec import RunSpec

        own = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(RunSpec)}
        return RunSpec(**{name: getattr(self, name) for name in own} | {"output_dir": output_dir, "model": model})

    @classmethod
    def resolved(cls, spec: RunSpec, work: Work, **found: Any) -> Recipe:
        """The recipe of a run under way: that of `spec` on `work`, with what was `found` in place of nulls."""
        theirs = {**dataclasses.asdict(work), **dataclasses.asdict(spec)}
        theirs["model"] = DEMO if work.model is None and spec.model == work.base else spec.model
        theirs["data"] = work.data or DEMO
        return cls(**{f.name: theirs[f.name] for f in dataclasses.fields(cls)} | found)
