"""The command as a user meets it, in processes of its own where start-up matters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "train"))
import small

from loratlas.catalog import systems
from loratlas.cli import app

COMMANDS = ("methods", "train", "compare", "export", "inspect")


def call(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> list[str]:
    """--model, --data and a short training."""
    root = tmp_path_factory.mktemp("work")
    model, data = small.bert(root / "bert"), small.write_jsonl(root / "reviews.jsonl", small.reviews(80))
    return ["--model", model, "--data", data, "--steps", "6", "--batch-size", "8", "--set", "r=2"]


@pytest.fixture(scope="module")
def trained(work: list[str], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    code, text, _ = call("train", "srlora", *work, "--out", str(out))
    assert code == 0
    assert "SRLoRA: accuracy" in text
    assert f"Adapter: {out / 'adapter'}" in text
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_and_shows_examples(command: str) -> None:
    code, text, _ = call(command, "--help")
    assert code == 0
    assert "--json" in text
    assert text.count(f"loratlas {command}") >= 2


def test_help_and_methods_load_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, loratlas_command\n"
        "sys.argv = ['loratlas', 'methods', '--json']\n"
        "try:\n    loratlas_command.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 56
    assert {"slug", "name", "paper", "year", "kind", "status", "exports", "summary"} <= set(rows[0])


def test_methods_as_a_table() -> None:
    code, text, _ = call("methods", "srlora")
    assert code == 0
    assert "2505.12433" in text
    assert "1 listed, 1 implemented" in text
    code, text, _ = call("methods", "--kind", "optimizer")
    assert sum(row.kind == "optimizer" for row in systems()) == text.count(" optimizer ")
    assert "peft-lora" in call("methods", "--baselines")[1]
    code, _, error = call("methods", "nothing*")
    assert code == 2
    assert "no method matches 'nothing*'" in error


def test_train_writes_an_adapter_that_peft_loads(work: list[str], trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["method"] == "srlora"
    assert result["options"] == {"r": 2}
    base = AutoModelForSequenceClassification.from_pretrained(work[1], num_labels=2)
    assert isinstance(PeftModel.from_pretrained(base, trained / "adapter"), PeftModel)


def test_train_prints_json_only_on_request(work: list[str], tmp_path: Path) -> None:
    code, text, error = call("train", "lora", *work, "--out", str(tmp_path / "a"), "--json")
    assert code == 0
    assert json.loads(text)["method"] == "lora"
    assert "LoRA: step 6, accuracy" in error


def test_compare_prints_a_leaderboard_and_writes_report_and_numbers(work: list[str], tmp_path: Path) -> None:
    words = ["compare", "lora", "srlora", "peft-lora", *work, "--out", str(tmp_path / "c"), "--seeds", "2"]
    code, text, _ = call(*words, "--set", "srlora.gamma=1.0", "--lr-grid", "1e-3,1e-2")
    assert code == 0
    for title in ("method", "accuracy", "difference", "rate", "trainable", "step time", "peak"):
        assert title in text
    for label in ("LoRA", "SRLoRA", "LoRA of PEFT"):
        assert label in text
    words_of = " ".join(text.split())
    assert "2 seeds, 6 steps, each method at the best learning rate of 0.001, 0.01" in words_of
    assert "Noise floor 0." in words_of
    assert "Winner: " in text or "No winner: " in text
    saved = json.loads((tmp_path / "c" / "results.json").read_text())
    assert [run["options"] for run in saved["runs"][:3]] == [{"r": 2}, {"r": 2, "gamma": 1.0}, {"r": 2}]
    page = (tmp_path / "c" / "report.html").read_text()
    for part in ("SRLoRA", "Difference to the baseline", "Learning-rate search", "Noise floor 0."):
        assert part in page
    assert len(list((tmp_path / "c").glob("*-seed*/adapter/adapter_config.json"))) == 6
    assert len(list((tmp_path / "c" / "search").glob("*-lr*/result.json"))) == 6
    assert len(list((tmp_path / "c" / "noise").glob("lora-seed100?/result.json"))) == 2
    code, _, error = call(*words)
    assert code == 2
    assert "is not empty: choose another --out" in error
    code, text, _ = call(*words, "--overwrite", "--seeds", "1", "--no-tune")
    assert code == 0
    assert "No winner: one seed gives no interval." in text
    assert "One seed, 6 steps, each method at its catalogued learning rate" in " ".join(text.split())
    code, again, _ = call(*words, "--resume", "--seeds", "1", "--no-tune")
    assert (code, again) == (0, text)
    code, _, error = call(*words, "--resume", "--seeds", "2", "--no-tune")
    assert code == 2
    assert "was begun with other settings: seeds was [0] and is [0, 1] now" in error


def test_export_and_inspect(work: list[str], trained: Path, tmp_path: Path) -> None:
    code, text, _ = call("inspect", str(trained))
    assert code == 0
    assert "srlora (ATLAS_SRLORA)" in text
    assert "Recomposition" in text
    found = json.loads(call("inspect", str(trained), "--json")[1])
    assert found["method"] == "srlora"
    assert len(found["layers"]) == 13
    code, text, _ = call("export", str(trained), "--to", "lora", "--out", str(tmp_path / "lora"))
    assert code == 0
    assert "exact" in text
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    code, text, _ = call("export", str(trained), "--to", "merged", "--out", str(tmp_path / "merged"), "--json")
    assert json.loads(text)["kind"] == "merged"
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    code, text, _ = call("export", str(trained), "--rank", "3", "--out", str(tmp_path / "small"), "--json")
    assert json.loads(text)["rank"] == 3
    assert json.loads(text)["relative_error"] > 0


MISTAKES = {
    "unknown method": (["train", "srlroa", "--demo"], "no method 'srlroa': did you mean srlora"),
    "planned method": (["train", "sora", "--demo"], "sora is planned and not implemented yet"),
    "no data": (["train", "srlora"], "--model and --data missing"),
    "unknown option": (["train", "srlora", "--demo", "--set", "gama=1"], "no option 'gama': did you mean gamma?"),
    "value out of range": (["train", "srlora", "--demo", "--set", "r_target=2"], "r_target"),
    "no value": (["train", "srlora", "--demo", "--set", "r"], "--set r is not NAME=VALUE"),
    "option of another": (["compare", "lora", "--demo", "--set", "srlora.r=2"], "srlora is not among the methods"),
    "resume nowhere": (["train", "srlora", "--demo", "--resume"], "--resume needs --out"),
    "resume a comparison nowhere": (["compare", "lora", "--demo", "--resume"], "--resume needs --out"),
    "no grid": (["compare", "lora", "--demo", "--lr-grid", "1e-3,high"], "--lr-grid 1e-3,high is no list of numbers"),
    "rank of merged": (["export", "x", "--out", "y", "--to", "merged", "--rank", "3"], "merged weights have none"),
    "no adapter": (["inspect", "absent"], "there is no directory absent"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_sentence_and_status_2(case: str) -> None:
    words, message = MISTAKES[case]
    code, text, error = call(*words)
    assert code == 2
    assert text == ""
    assert message in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1


def test_a_diverging_run_says_so_and_keeps_its_adapter(work: list[str], tmp_path: Path) -> None:
    code, _, error = call("train", "lora", *work, "--learning-rate", "1e38", "--out", str(tmp_path / "d"))
    assert code == 2
    assert "was not finite at step" in error
    assert json.loads((tmp_path / "d" / "result.json").read_text())["diverged_at"] >= 2
    assert (tmp_path / "d" / "adapter" / "adapter_model.safetensors").is_file()
