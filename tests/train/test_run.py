"""Runs: reproducible, resumable, and nothing is lost when one diverges."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from loratlas import UserError
from loratlas.analysis.inspect import inspect_adapter
from loratlas.analysis.ranks import rank_at
from loratlas.train.data import TaskData, load_task
from loratlas.train.progress import Progress
from loratlas.train.results import RunResult
from loratlas.train.run import RunSpec, prepare_output, run
from loratlas.train.tables import read_tables

R2 = {"r": 2}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(bert: str, tmp_path_factory) -> TaskData:
    path = small.write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", small.reviews(120))
    return load_task(read_tables(path), bert, name="reviews")


def spec(bert: str, out: Path, method: str = "srlora", **settings: Any) -> RunSpec:
    defaults: dict[str, Any] = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "options": R2}
    return RunSpec(method, bert, str(out), **{**defaults, **settings})


class Seen(Progress):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def started(self, label: str, steps: int) -> None:
        self.calls.append(("started", label, steps))

    def step(self, step: int, loss: float) -> None:
        self.calls.append(("step", step, loss))

    def evaluated(self, step: int, metric: str, value: float) -> None:
        self.calls.append(("evaluated", step, metric, value))

    def finished(self, result: RunResult) -> None:
        self.calls.append(("finished", result.method))


def test_parameters_are_counted_before_a_method_freezes_some(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    counts = [
        run(
            spec(bert, tmp_path / str(fraction), "lamda", steps=2, options={"r": 2, "freeze_fraction": fraction}),
            reviews,
        )
        for fraction in (0.0, 1.0)
    ]
    assert counts[0].trainable_parameters == counts[1].trainable_parameters


def test_a_run_learns_and_writes_all_that_it_says(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    seen = Seen()
    result = run(spec(bert, tmp_path, steps=60, learning_rate=2e-2), reviews, seen)
    assert result.final == 1.0
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert [row["step"] for row in result.history] == list(range(1, 61))
    assert [row["step"] for row in result.evals] == [12, 24, 36, 48, 60]
    assert {"eval_loss", "accuracy", "f1", "matthews"} <= set(result.evals[0])
    assert json.loads((tmp_path / "result.json").read_text()) == result.to_dict()
    assert seen.calls[0] == ("started", "SRLoRA", 60)
    assert seen.calls[-1] == ("finished", "srlora")
    assert sum(call[0] == "step" for call in seen.calls) == 60
    names = {f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in LAYERS}
    assert {event["layer"] for event in result.events} == {*names, "bert.pooler.dense"}
    assert {state["layer"] for state in result.recomposition} == {event["layer"] for event in result.events}
    steps = sorted({event["step"] for event in result.events})
    assert [event["step"] for event in result.fresh] == steps
    assert [event["ages"][-1] for event in result.fresh] == [b - a for a, b in itertools.pairwise([*steps, 60])]
    assert result.step_seconds > 0
    assert not (tmp_path / "checkpoints").exists()

    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = PeftModel.from_pretrained(base, result.adapter_dir).eval()
    rows = [reviews.test[i] for i in range(len(reviews.test))]
    batch = reviews.collator(rows)
    with torch.no_grad():
        right = model(**batch).logits.argmax(-1) == batch["labels"]
    assert right.float().mean().item() == result.final


LAYERS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.mark.parametrize("method", ["increlora", "triadaptlora"])
def test_a_run_tells_how_its_ranks_moved(bert: str, reviews: TaskData, tmp_path: Path, method: str) -> None:
    result = run(spec(bert, tmp_path, method, steps=20, options={"r": 2}), reviews)
    assert len(result.ranks) == 13
    assert sum(layer["ranks"][-1] for layer in result.ranks) == 13 * 2
    assert all(layer["steps"][0] == 0 and layer["ranks"][0] == 1 for layer in result.ranks)
    assert {rank_at(layer, 20) for layer in result.ranks} > {1}
    found = inspect_adapter(result.adapter_dir)
    assert found.ranks == result.ranks
    assert [layer.rank for layer in found.layers] == [layer["ranks"][-1] for layer in result.ranks]
    assert inspect_adapter(run(spec(bert, tmp_path / "lora", "lora", steps=2), reviews).adapter_dir).ranks == []


def test_runs_repeat_bit_for_bit(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    first, again = (run(spec(bert, tmp_path / name), reviews) for name in "ab")
    assert first.history == again.history
    assert first.evals == again.evals
    other = run(spec(bert, tmp_path / "c", seed=1), reviews)
    assert other.history != first.history


@pytest.mark.parametrize("method", ["lora", "pissa", "srlora", "lora-ga", "increlora"])
def test_resume_continues_bit_for_bit(bert: str, reviews: TaskData, tmp_path: Path, method: str) -> None:
    whole = run(spec(bert, tmp_path / "whole", method), reviews)
    broken = spec(bert, tmp_path / "broken", method, save_every=5)

    class Kill(Progress):
        def step(self, step: int, loss: float) -> None:
            if step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, reviews, Kill())
    resumed = run(broken, reviews, resume=True)
    assert resumed.history == whole.history
    assert resumed.evals[-1] == whole.evals[-1]
    assert resumed.events == whole.events
    assert resumed.ranks == whole.ranks
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_divergence_keeps_the_last_good_adapter(
    bert: str, reviews: TaskData, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # evaluations draw from the generator that dropout uses, so there are none in between
    steady: dict[str, Any] = {"lr_scheduler": "constant", "warmup": 0.0, "eval_every": 100}
    good = run(spec(bert, tmp_path / "good", "lora", steps=5, **steady), reviews)
    forward, calls = torch.nn.functional.cross_entropy, []

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * float("nan") if how == "loss" else x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * float("inf")

    def bad(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = forward(logits, *args, **kwargs)
        calls.append(value.requires_grad)
        return Broken.apply(value) if sum(calls) == 6 and value.requires_grad else value

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", bad)
    result = run(spec(bert, tmp_path / "bad", "lora", steps=12, **steady), reviews)
    assert result.diverged_at == 6
    assert len(result.history) == 5
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("good", "bad")]
    assert files[0] == files[1]
    assert result.final == good.final


def test_accumulated_batches_make_the_same_step(reviews: TaskData, tmp_path: Path) -> None:
    bert = small.bert(tmp_path / "bert", dropout=0.0)
    one = run(spec(bert, tmp_path / "one", steps=3), reviews)
    four = run(spec(bert, tmp_path / "four", steps=3, batch_size=2, gradient_accumulation=4), reviews)
    assert four.batch_size == one.batch_size == 8
    losses = [[row["loss"] for row in result.history] for result in (one, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_images_and_language_models_train(tmp_path: Path) -> None:
    vit = small.vit(tmp_path / "vit")
    images = load_task(read_tables(small.image_folder(tmp_path / "images")), vit)
    result = run(spec(vit, tmp_path / "a", steps=30), images)
    assert result.final == 1.0
    assert result.metric == "accuracy"
    gpt = small.gpt(tmp_path / "gpt")
    (tmp_path / "text.txt").write_text("\n\n".join(["a very good film", "the book"] * 60))
    texts = load_task(read_tables(str(tmp_path / "text.txt")), gpt, max_length=16)
    result = run(spec(gpt, tmp_path / "b", steps=30, learning_rate=3e-2), texts)
    values = [row["perplexity"] for row in result.evals]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] < len(small.WORDS) + 1


def test_bad_settings_are_named_before_anything_runs(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps must be at least 1"):
        spec(bert, tmp_path, steps=0)
    with pytest.raises(UserError, match=r"target_modules \(nothing\) match no module .*names that it can adapt: "):
        run(spec(bert, tmp_path, options={"target_modules": ["nothing"]}), reviews)
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        run(spec(bert, tmp_path), reviews, resume=True)
    with pytest.raises(UserError, match="could not be loaded for text-classification"):
        run(spec(str(tmp_path / "absent"), tmp_path), reviews)
    assert not any(tmp_path.iterdir())


def test_output_directories_are_not_overwritten_unasked(tmp_path: Path) -> None:
    assert prepare_output(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty: choose another --out"):
        prepare_output(tmp_path / "old")
    prepare_output(tmp_path / "old", overwrite=True)
    assert not (tmp_path / "old").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare_output(tmp_path / "file")
