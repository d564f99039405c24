"""What a run has forgotten of the base model's old work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from peft import PeftModel
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from loratlas import UserError
from loratlas.train.compare import compare
from loratlas.train.forgetting import BaseTask
from loratlas.train.run import RunSpec
from loratlas.train.work import Work

PAIRS = [
    {"sentence1": "a good film", "sentence2": "a fine film", "score": 5.0},
    {"sentence1": "a good film", "sentence2": "the bad book", "score": 1.0},
    {"sentence1": "not a good book", "sentence2": "a poor book", "score": 4.0},
    {"sentence1": "very bad", "sentence2": "a very fine film", "score": 0.5},
    {"sentence1": "the book", "sentence2": "the film", "score": 3.0},
]


def spec(model: str, out: Path, **settings: Any) -> RunSpec:
    return RunSpec("", model, str(out), **{"steps": 10, "batch_size": 8, "options": {"r": 2}, **settings})


def test_an_encoders_sentence_vectors_before_and_after(tmp_path: Path) -> None:
    model = small.bert(tmp_path / "bert", dropout=0.0)
    work = Work(model, small.write_jsonl(tmp_path / "a.jsonl", small.reviews(60)))
    pairs = BaseTask(small.write_jsonl(tmp_path / "pairs.jsonl", PAIRS))
    result = compare(
        ["lora", "srlora"], spec(model, tmp_path / "out", learning_rate=5e-2), work, seeds=[0], base_task=pairs
    )
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()

    def vector(text: str) -> torch.Tensor:
        return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    with torch.no_grad():
        cosines = [float(torch.cosine_similarity(vector(p["sentence1"]), vector(p["sentence2"]), dim=0)) for p in PAIRS]
    expected = spearmanr(cosines, [pair["score"] for pair in PAIRS])[0]
    for run in result.runs:
        assert run.forgetting["metric"] == "spearman"
        assert run.forgetting["before"] == pytest.approx(expected)
    row = result.rows()[0]["forgetting"]
    assert row["change"]["mean"] == pytest.approx(row["after"] - row["before"])


def test_a_whole_model_before_and_after(tmp_path: Path) -> None:
    model = small.gpt(tmp_path / "gpt")
    texts, old = tmp_path / "texts.txt", tmp_path / "old.txt"
    texts.write_text("\n\n".join(["a very good film", "the book"] * 60))
    old.write_text("\n\n".join(["poor", "bad not fine"] * 60))
    base = BaseTask(str(old), max_length=16)
    work = Work(model, str(texts), max_length=16)
    template = spec(model, tmp_path / "out", learning_rate=1e-2, options={})
    options = {"lora": {"r": 2}}
    found = compare(["lisa", "lora"], template, work, seeds=[0], base_task=base, grid=(), options=options).runs
    before = {run.forgetting["before"] for run in found}
    assert len(before) == 1
    assert before.pop() < found[0].forgetting["after"]
    template = spec(model, tmp_path / "searched", options={}, steps=2)
    searched = compare(["lisa"], template, work, seeds=[0], grid=(1e-3, 1e-2))
    assert [Path(run.model_dir or run.adapter_dir).name for run in found] == ["model", "adapter"]
    assert not [run.model_dir for run in searched.search_runs if run.model_dir]
    assert not list((tmp_path / "searched" / "search").glob("*/model"))


def test_a_language_models_perplexity_before_and_after(tmp_path: Path) -> None:
    model = small.gpt(tmp_path / "gpt")
    texts, old = tmp_path / "texts.txt", tmp_path / "old.txt"
    texts.write_text("\n\n".join(["a very good film", "the book"] * 60))
    old.write_text("\n\n".join(["poor", "bad not fine"] * 60))
    work = Work(model, str(texts), max_length=16)
    base = BaseTask(str(old), max_length=16)
    result = compare(["lora"], spec(model, tmp_path / "out", learning_rate=5e-2), work, seeds=[0], base_task=base)
    found = result.runs[0].forgetting
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    stream = tokenizer("poor [SEP] bad not fine [SEP]")["input_ids"] * 60
    blocks = torch.tensor(stream[: len(stream) // 16 * 16]).view(-1, 16)

    def perplexity(model: Any) -> float:
        with torch.no_grad():
            return float(model(input_ids=blocks, labels=blocks).loss.exp())

    assert found["before"] == pytest.approx(perplexity(plain), rel=1e-4)
    adapted = PeftModel.from_pretrained(plain, result.runs[0].adapter_dir).eval()
    assert found["after"] == pytest.approx(perplexity(adapted), rel=1e-4)
    assert abs(found["after"] - found["before"]) > 0.1


def test_old_work_that_does_not_fit_is_refused_before_the_first_run(tmp_path: Path) -> None:
    model = small.bert(tmp_path / "bert")
    path = small.write_jsonl(tmp_path / "a.jsonl", small.reviews(60))
    with pytest.raises(UserError, match=r"the base task .*a\.jsonl of an encoder needs pairs of texts"):
        compare(["lora"], spec(model, tmp_path / "out"), Work(model, path), base_task=BaseTask(path))
    with pytest.raises(UserError, match="there is no file or folder"):
        compare(["lora"], spec(model, tmp_path / "out"), Work(model, path), base_task=BaseTask("./absent.jsonl"))
    assert not (tmp_path / "out").exists()


def test_resume_measures_what_is_missing_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.bert(tmp_path / "bert")
    work = Work(model, small.write_jsonl(tmp_path / "a.jsonl", small.reviews(60)))
    pairs = BaseTask(small.write_jsonl(tmp_path / "pairs.jsonl", PAIRS))
    measure = BaseTask.measure

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseTask, "measure", interrupted)
    plan: dict[str, Any] = {"seeds": [0], "base_task": pairs}
    with pytest.raises(KeyboardInterrupt):
        compare(["lora"], spec(model, tmp_path / "out", learning_rate=1e-2), work, **plan)
    weights = tmp_path / "out" / "lora" / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr(BaseTask, "measure", measure)
    result = compare(["lora"], spec(model, tmp_path / "out", learning_rate=1e-2), work, **plan, resume=True)
    assert result.runs[0].forgetting is not None
    assert weights.stat().st_mtime_ns == before
