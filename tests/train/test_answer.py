"""Answers of adapter and base are those of the models themselves, for every task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loratlas import UserError
from loratlas.analysis.adapter_folder import read_adapter
from loratlas.train.answer import Answerer
from loratlas.train.run import RunSpec, run
from loratlas.train.work import Work


def trained(work: Work, out: Path, steps: int = 4, method: str = "srlora") -> Path:
    spec = RunSpec(method, work.base, str(out), steps=steps, batch_size=8, learning_rate=2e-2, options={"r": 2})
    return Path(run(spec, work.load()).adapter_dir)


def test_classes_beside_those_of_the_base(tmp_path: Path) -> None:
    base = small.bert(tmp_path / "bert", dropout=0.0)
    folder = trained(Work(base, small.write_jsonl(tmp_path / "d.jsonl", small.reviews(80))), tmp_path / "run", steps=40)
    answerer = Answerer(read_adapter(folder))
    before, after = answerer.answer("a very bad film")
    assert before is not None
    assert after.label == "no"
    assert [label for label, _ in after.top] == ["no", "yes"]

    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    inputs = AutoTokenizer.from_pretrained(base)("a very bad film", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)[0]
        adapted = PeftModel.from_pretrained(model, folder).eval()(**inputs).logits.softmax(-1)[0]
    assert dict(before.top) == pytest.approx(dict(zip(["no", "yes"], expected.tolist(), strict=True)))
    assert dict(after.top) == pytest.approx(dict(zip(["no", "yes"], adapted.tolist(), strict=True)))


def test_a_new_head_has_no_answer_of_the_base(tmp_path: Path) -> None:
    rows = [{**row, "label": f"{index % 4}"} for index, row in enumerate(small.reviews(80))]
    base, data = small.bert(tmp_path / "bert"), small.write_jsonl(tmp_path / "d.jsonl", rows)
    answerer = Answerer(read_adapter(trained(Work(base, data), tmp_path / "run")))
    assert answerer.new == ["classifier.bias", "classifier.weight"]
    before, after = answerer.answer("a good film\ta bad book")
    assert before is None
    assert len(after.top) == 3
    assert after.top[0][1] >= after.top[1][1] >= after.top[2][1]


def test_numbers(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": 0.5 * (row["label"] == "yes")} for row in small.reviews(80)]
    base, data = small.bert(tmp_path / "bert"), small.write_jsonl(tmp_path / "d.jsonl", rows)
    answerer = Answerer(read_adapter(trained(Work(base, data), tmp_path / "run", steps=60)))
    good, bad = (answerer.answer(f"a very {word} film")[1].value for word in ("good", "bad"))
    assert good is not None
    assert bad is not None
    assert good > bad


def test_continuations(tmp_path: Path) -> None:
    rows = [{"text": "a very good film the very good book"} for _ in range(200)]
    base, data = small.gpt(tmp_path / "gpt"), small.write_jsonl(tmp_path / "d.jsonl", rows)
    folder = trained(Work(base, data, max_length=16), tmp_path / "run", steps=60, method="lora")
    answerer = Answerer(read_adapter(folder), max_new_tokens=3)
    before, after = answerer.answer("a very")
    assert before is not None
    assert answerer.new == []
    assert after.text == "good film the"
    assert before.text != after.text


def test_images(tmp_path: Path) -> None:
    data = small.image_folder(tmp_path / "images")
    folder = trained(Work(small.vit(tmp_path / "vit"), data), tmp_path / "run", steps=30)
    answerer = Answerer(read_adapter(folder))
    assert answerer.answer(f"{data}/test/red/3.png")[1].label == "red"
    assert answerer.answer(f"{data}/test/blue/3.png")[1].label == "blue"
    with pytest.raises(UserError, match=r"there is no image absent\.png"):
        answerer.answer("absent.png")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read as an image"):
        answerer.answer(str(folder / "adapter_config.json"))


def test_an_adapter_of_peft_alone(tmp_path: Path) -> None:
    base = small.bert(tmp_path / "bert")
    data = small.write_jsonl(tmp_path / "d.jsonl", small.reviews(80))
    folder = trained(Work(base, data), tmp_path / "run", method="peft-lora")
    for file in folder.iterdir():  # what PEFT would not have written
        if not file.name.startswith("adapter_"):
            file.unlink()
    answerer = Answerer(read_adapter(folder))
    assert answerer.task == "text-classification"
    assert answerer.answer("a good film")[1].label in ("LABEL_0", "LABEL_1")
    (folder / "task.json").write_text(json.dumps({"task": 1}))
    with pytest.raises(UserError, match=r"task\.json is damaged"):
        Answerer(read_adapter(folder))
