"""`AtomicCheckpoints` in any Trainer: exact, whole, without pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from peft import LoraConfig, get_peft_model
from toys import raw
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from loratlas import AtomicCheckpoints, LifecycleCallback, SRLoraConfig, UserError
from loratlas.train.data import TaskData, load_task
from loratlas.train.tables import read_tables


class Whole(AtomicCheckpoints, Trainer):
    """As in the guide."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(bert: str, tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    path = small.write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", small.reviews(64))
    return load_task(read_tables(path), bert, name="reviews")


def trainer(
    cls: type[Trainer], bert: str, reviews: TaskData, out: Path, config: Any, callbacks: Any = (), **arguments: Any
) -> Trainer:
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    if config is not None:
        model = get_peft_model(model, config)
    settings: dict[str, Any] = {
        "max_steps": 10,
        "save_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 2,
        **arguments,
    }
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(out), **settings),
        train_dataset=reviews.train,
        eval_dataset=reviews.test,
        data_collator=DataCollatorWithPadding(reviews.processor),
        compute_metrics=reviews.measure,
        callbacks=[LifecycleCallback(), *callbacks],
    )


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


def trained(model: torch.nn.Module) -> list[bytes]:
    return [raw(tensor) for tensor in model.state_dict().values()]


@pytest.mark.parametrize(
    "config",
    [
        SRLoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
        LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.1),
        None,
    ],
    ids=["srlora", "peft-lora", "full"],
)
def test_any_trainer_resumes_bit_for_bit_without_a_pickle(
    bert: str, reviews: TaskData, tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer(Trainer, bert, reviews, tmp_path / "plain", config, save_strategy="no")
    plain.train()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(KeyboardInterrupt):
        trainer(Whole, bert, reviews, tmp_path / "out", config, [Kill()]).train()
    (tmp_path / "out" / "checkpoint-9").mkdir()  # what Trainer's own would leave, killed while it saves
    resumed = trainer(Whole, bert, reviews, tmp_path / "out", config)
    resumed.train(resume_from_checkpoint=True)
    assert trained(resumed.model) == trained(plain.model)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-9", "checkpoint-10"}
    files = [path for path in (tmp_path / "out" / "checkpoint-10").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt", ""}
    arguments = json.loads((tmp_path / "out" / "checkpoint-10" / "training_args.json").read_text())
    assert arguments["max_steps"] == 10
    assert arguments["learning_rate"] == 1e-2
    finished = trainer(Whole, bert, reviews, tmp_path / "out", config)
    assert finished.train(resume_from_checkpoint=True).global_step == 10
    assert trained(finished.model) == trained(plain.model)


def test_the_best_checkpoint_stays_and_is_loaded(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.5, 0.2, 0.3])
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    made = trainer(
        Whole,
        bert,
        reviews,
        tmp_path,
        config,
        save_total_limit=2,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="made_up",
        greater_is_better=True,
    )
    made.compute_metrics = lambda _: {"made_up": next(scores)}
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10"}
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


def test_what_cannot_be_resumed_is_one_sentence(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    trainer(Whole, bert, reviews, tmp_path / "a", config, max_steps=2, save_steps=1).train()
    with pytest.raises(UserError, match=r"other configuration of adapter 'default': r was 2 and is 4\."):
        trainer(
            Whole, bert, reviews, tmp_path / "a", LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
        ).train(True)
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        trainer(Whole, bert, reviews, tmp_path / "b", config).train(resume_from_checkpoint=True)
    trainer(Whole, bert, reviews, tmp_path / "c", config, max_steps=1, save_only_model=True, save_steps=1).train()
    with pytest.raises(UserError, match=r"holds no optimizer\.json: it was written without that part"):
        trainer(Whole, bert, reviews, tmp_path / "c", config).train(resume_from_checkpoint=True)
    trainer(Trainer, bert, reviews, tmp_path / "d", config, max_steps=1, save_steps=1).train()
    with pytest.raises(UserError, match="checkpoint-1 is not complete"):
        trainer(Whole, bert, reviews, tmp_path / "d", config).train(str(tmp_path / "d" / "checkpoint-1"))
