"""Every kind of data becomes a task, and bad data one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from datasets import Dataset, load_dataset
from transformers import EvalPrediction

from loratlas import UserError
from loratlas.train import demo
from loratlas.train.data import TaskData, load_task
from loratlas.train.encode import token_losses
from loratlas.train.metrics import classification, perplexity, regression
from loratlas.train.tables import read_tables


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


def task(path: str, model: str, test: str | None = None, **options) -> TaskData:
    return load_task(read_tables(path, test), model, name=path, **options)


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_files_of_every_form_give_the_same_task(tmp_path: Path, bert: str, form: str) -> None:
    rows = Dataset.from_list(small.reviews())
    path = tmp_path / f"data.{form}"
    if form == "jsonl":
        rows.to_json(path)
    elif form == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_csv(path, sep="\t" if form == "tsv" else ",", index=False)
    found = task(str(path), bert)
    assert found.task == "text-classification"
    assert found.labels == ["no", "yes"]
    assert (len(found.train), len(found.test)) == (54, 6)
    assert found.metric == "accuracy"
    assert set(found.train.column_names) >= {"input_ids", "attention_mask", "labels"}
    batch = found.collator([found.train[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 4)


def test_a_folder_with_splits_prefers_validation_rows(tmp_path: Path, bert: str) -> None:
    rows = small.reviews()
    for name, part in (("train", rows[:40]), ("dev", rows[40:52]), ("test", rows[52:])):
        small.write_jsonl(tmp_path / f"{name}.jsonl", part)
    assert (len(task(str(tmp_path), bert).train), len(task(str(tmp_path), bert).test)) == (40, 12)
    assert len(task(str(tmp_path), bert, test="test").test) == 8
    assert "split dev" in task(str(tmp_path), bert).description


def test_pairs_regression_and_class_numbers(tmp_path: Path, bert: str) -> None:
    rows = [{"sentence1": "a good film", "sentence2": "a bad film", "label": i / 10} for i in range(30)]
    found = task(small.write_jsonl(tmp_path / "a.jsonl", rows), bert)
    assert (found.task, found.metric, found.num_labels) == ("regression", "pearson", 1)
    assert len(found.train[0]["input_ids"]) == 6
    assert isinstance(found.train[0]["labels"], float)
    numbered = [{"text": "good", "label": [3, 7][i % 2]} for i in range(30)]
    found = task(small.write_jsonl(tmp_path / "b.jsonl", numbered), bert)
    assert found.labels == ["3", "7"]
    assert set(found.train["labels"]) == {0, 1}
    assert task(str(tmp_path / "b.jsonl"), bert, metric="matthews").metric == "matthews"


def test_causal_lm_packs_blocks(tmp_path: Path) -> None:
    model = small.gpt(tmp_path / "gpt")
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["a very good film", "the book"] * 40))
    found = task(str(path), model, max_length=16)
    assert (found.task, found.metric, found.greater_is_better) == ("causal-lm", "perplexity", False)
    assert {len(row["input_ids"]) for row in found.train} == {16}
    assert found.train[0]["labels"] == found.train[0]["input_ids"]
    text, end = small.WORDS.index("a"), small.WORDS.index("[SEP]")
    assert {text, end} <= set(found.train[0]["input_ids"])


def test_images_are_decoded_on_access(tmp_path: Path) -> None:
    model = small.vit(tmp_path / "vit")
    found = task(small.image_folder(tmp_path / "images"), model)
    assert (found.task, found.labels) == ("image-classification", ["blue", "red"])
    batch = found.collator([found.train[0], found.train[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    # a Parquet file that lost its image feature, as CIFAR-10's copies have it
    raw = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train")
    rows = [
        {"image": {"bytes": Path(image["path"]).read_bytes(), "path": None}, "label": label}
        for image, label in zip(raw.cast_column("image", _undecoded())["image"], raw["label"], strict=True)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    again = task(str(tmp_path / "train.parquet"), model)
    assert again.task == "image-classification"
    assert again.train[0]["pixel_values"].shape == (3, 16, 16)


def _undecoded():
    from datasets import Image

    return Image(decode=False)


def test_limit_takes_a_seeded_sample(tmp_path: Path) -> None:
    path = small.write_jsonl(tmp_path / "a.jsonl", small.reviews(200))
    first, again = (read_tables(path, limit=20) for _ in range(2))
    assert (len(first.train), len(first.test)) == (20, 20)
    assert first.train["text"] == again.train["text"]
    assert first.train["text"] != read_tables(path, limit=20, seed=1).train["text"]


BAD = {
    "not JSON": ('{"text": "a", "label": 1}\n{"text": oops}\n', r"data\.jsonl, line 2: not JSON \(Expecting value"),
    "no object": ("[1, 2]\n", r"line 1: not an object"),
    "empty": ("", r"data\.jsonl is empty"),
    "no label": (
        '{"text": "a", "label": null}\n{"text": "b", "label": "x"}\n' * 9,
        r"(training|test) row \d+ of .* has no label",
    ),
    "one class": ('{"text": "a", "label": 1}\n' * 20, r"only one label \(1\)"),
    "few": ('{"text": "a", "label": 1}\n' * 5, r"too few to hold a tenth out"),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_files_are_named_with_their_line(tmp_path: Path, bert: str, case: str) -> None:
    content, message = BAD[case]
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        task(str(tmp_path / "data.jsonl"), bert)


def test_columns_that_do_not_fit_are_named(tmp_path: Path, bert: str) -> None:
    rows = [{"body": "a good film", "title": "film", "mark": "yes"} for _ in range(20)]
    path = small.write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"no label column for text-classification \(columns: body, title, mark\)"):
        task(path, bert, task="text-classification")
    with pytest.raises(UserError, match=r"no column 'marc'.*Did you mean mark\?"):
        task(path, bert, label_column="marc")
    with pytest.raises(UserError, match="leaves open which column holds the text"):
        task(path, bert, label_column="mark")
    with pytest.raises(UserError, match=r"did you mean text-classification\?"):
        task(path, bert, task="classification")
    with pytest.raises(UserError, match="no metric 'bleu': choose accuracy"):
        task(small.write_jsonl(tmp_path / "b.jsonl", small.reviews()), bert, metric="bleu")
    words = [{"text": "a", "label": "high"} for _ in range(20)]
    with pytest.raises(UserError, match=r"training row 1 of .* has the label 'high', which is not a number"):
        task(small.write_jsonl(tmp_path / "c.jsonl", words), bert, task="regression")


def test_labels_that_training_never_saw(tmp_path: Path, bert: str) -> None:
    train = small.write_jsonl(tmp_path / "train.jsonl", small.reviews())
    rows = [*small.reviews(3), {"text": "a film", "label": "maybe"}]
    test = small.write_jsonl(tmp_path / "other.jsonl", rows)
    with pytest.raises(UserError, match=r"test row 4 of .* has the label 'maybe', which never occurs in training"):
        task(train, bert, test=test)
    with pytest.raises(UserError, match="neither a file nor a split"):
        task(train, bert, test="holdout")


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file or folder .*absent\.csv"):
        read_tables(str(tmp_path / "absent.csv"))
    with pytest.raises(UserError, match="neither files named after their split"):
        read_tables(str(tmp_path))
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"unknown format: use \.jsonl"):
        read_tables(str(tmp_path / "data.xlsx"))
    small.write_jsonl(tmp_path / "a.jsonl", small.reviews())
    with pytest.raises(UserError, match=r"tokenizer of .* could not be loaded"):
        task(str(tmp_path / "a.jsonl"), str(tmp_path / "no-model"))


def test_metrics_against_hand_computed_values() -> None:
    logits, truth = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]), np.array([0, 1, 1, 0])
    found = classification(EvalPrediction(logits, truth))
    # guesses 0 1 0 0: TP=1 FP=0 FN=1 TN=2 for class 1
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["matthews"] == pytest.approx((1 * 2 - 0) / np.sqrt(1 * 2 * 2 * 3))
    found = regression(EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])))
    assert found["mse"] == pytest.approx(1 / 3)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
    assert regression(EvalPrediction(np.ones((3, 1)), np.arange(3.0)))["pearson"] == 0.0


def test_perplexity_weighs_every_token_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    labels[1, 3:] = -100
    sums = token_losses(logits, labels)
    logp = logits.log_softmax(-1)
    terms = [-logp[i, t, labels[i, t + 1]] for i in range(3) for t in range(4) if labels[i, t + 1] >= 0]
    assert sums[:, 1].tolist() == [4, 2, 4]
    found = perplexity(EvalPrediction(sums.numpy(), labels.numpy()))
    assert found["perplexity"] == pytest.approx(float(torch.stack(terms).mean().exp()), rel=1e-5)


def test_the_embedded_task_is_real_and_stable() -> None:
    first, again = demo.docstrings(), demo.docstrings()
    assert first.train.to_list() == again.train.to_list()
    assert len(first.test) == 500
    assert len(first.train) > 2000
    names = first.train.features["label"].names
    assert len(names) >= 15
    texts = [*first.train["text"], *first.test["text"]]
    assert len(set(texts)) == len(texts)
    row = first.train[0]
    assert json.dumps(row)
    counts = np.bincount([*first.train["label"], *first.test["label"]], minlength=len(names))
    assert counts.min() >= 40
