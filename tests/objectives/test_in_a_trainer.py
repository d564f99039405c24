"""Both objectives in transformers' Trainer: stopped and resumed they end where an uninterrupted run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language import VOCAB, adapted, batch
from toys import trainable
from transformers import Trainer, TrainingArguments, set_seed

from loratlas import BALoraConfig, LoKUConfig, PairCollator, PairedData
from loratlas.engine.parts import Objective

STEPS, HALF = 8, 4


class WithObjective(Trainer):
    objective: Objective

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        self.objective.at(self.state.global_step, self.state.max_steps)
        loss, outputs = self.objective.forward(model, inputs)
        return (loss, outputs) if return_outputs else loss


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    made = batch(count, seed=seed)
    return [{name: value[i] for name, value in made.items()} for i in range(count)]


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def train(slug: str, folder: Path, resume: Path | None = None) -> list[torch.Tensor]:
    set_seed(0)
    model = adapted("pissa", lora_dropout=0.2)
    forget, retain = rows(4, seed=1), rows(9, seed=2)
    paired = slug == "loku"
    trainer = WithObjective(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=HALF,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=PairedData(forget, retain, passes=5) if paired else retain,
        data_collator=PairCollator(collate) if paired else collate,
    )
    config = LoKUConfig() if paired else BALoraConfig(lambda2=0.5, lambda3=0.5, top_k_entropy=VOCAB)
    trainer.objective = config.build(model)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert set(trainer.objective.terms) == (
        {"forget", "retain"} if paired else {"task", "consistency", "diversity", "svd"}
    )
    return [parameter.detach().clone() for parameter in trainable(model)]


@pytest.mark.parametrize("slug", ["ba-lora", "loku"])
def test_a_resumed_run_is_the_uninterrupted_one(slug: str, tmp_path: Path) -> None:
    whole = train(slug, tmp_path / "whole")
    resumed = train(slug, tmp_path / "again", resume=tmp_path / "whole" / f"checkpoint-{HALF}")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
