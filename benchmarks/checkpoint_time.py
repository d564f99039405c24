"""What an atomic checkpoint costs: SRLoRA on the demo's model, beside the checkpoint of Trainer itself.

    python benchmarks/checkpoint_time.py --out runs/checkpoint-time

Trains a few steps, then writes the same state with both, in turn. Prints medians in milliseconds, and of ours also
without fsync, as Trainer writes.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import typer

from loratlas.commands.quiet import quiet_libraries
from loratlas.files import write_json


def main(
    out: Annotated[Path, typer.Option(help="Directory to write into.")], rounds: int = 15, steps: int = 30
) -> None:
    quiet_libraries()
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from loratlas import AtomicCheckpoints, LifecycleCallback, SRLoraConfig, files
    from loratlas.train import demo
    from loratlas.train.data import load_task
    from loratlas.train.models import load_model
    from loratlas.train.run import prepare_output

    prepare_output(out, overwrite=True)
    model = demo.demo_model()
    task = load_task(demo.docstrings(), model, name=demo.NAME, max_length=demo.MAX_LENGTH)
    adapted = get_peft_model(
        load_model(model, task), SRLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    )
    kinds: dict[str, Any] = {"Trainer": Trainer, "AtomicCheckpoints": type("Whole", (AtomicCheckpoints, Trainer), {})}

    def trainer(kind: str, limit: int) -> Any:
        settings: dict[str, Any] = {
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": limit,
        }
        return kinds[kind](
            model=adapted,
            args=TrainingArguments(output_dir=str(out / kind), **settings),
            train_dataset=task.train,
            data_collator=task.collator,
            processing_class=task.processor,
            callbacks=[LifecycleCallback()],
        )

    trainers = {kind: trainer(kind, limit) for kind, limit in (("AtomicCheckpoints", steps), ("Trainer", 1))}
    for each in trainers.values():
        each.train()
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, kind, sync in (
            ("Trainer", "Trainer", True),
            ("AtomicCheckpoints", "AtomicCheckpoints", True),
            ("AtomicCheckpoints without fsync", "AtomicCheckpoints", False),
        ):
            shutil.rmtree(out / kind, ignore_errors=True)
            with mock.patch.object(files, "_sync", files._sync if sync else lambda path: None):
                began = time.perf_counter()
                trainers[kind]._save_checkpoint(adapted, None)
                times.setdefault(name, []).append(time.perf_counter() - began)
    size = sum(file.stat().st_size for file in (out / "AtomicCheckpoints").rglob("*") if file.is_file())
    table = {name: round(1000 * median(values), 1) for name, values in times.items()}
    write_json(out / "times.json", {"milliseconds": table, "bytes": size, "rounds": rounds})
    typer.echo(f"{size / 1e6:.1f} MB: " + ", ".join(f"{name} {value:g} ms" for name, value in table.items()))


if __name__ == "__main__":
    typer.run(main)
