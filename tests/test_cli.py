"""The command as a user meets it, in processes of its own where start-up matters."""

from __future__ import annotations

import io
import json
import shutil
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
from loratlas.commands.try_ import _lines

COMMANDS = ("methods", "train", "compare", "try", "export", "inspect")


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


def test_a_recipe_that_cannot_run_is_refused_without_torch(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("method: srlora\nmodel: demo\nstepz: 3\nbatch_size: x\n")
    script = (
        "import sys, loratlas_command\n"
        f"sys.argv = ['loratlas', 'train', {str(bad)!r}]\n"
        "try:\n    loratlas_command.main()\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stderr.splitlines()
    assert first == "error: 3 mistakes:"
    assert [line.split(": ")[0].strip() for line in lines] == [f"{bad}, line 3", f"{bad}, line 4", str(bad)]


def test_init_writes_a_recipe_and_never_over_another(tmp_path: Path) -> None:
    code, printed, _ = call("init", "srlora")
    assert code == 0
    assert "method: srlora" in printed
    file = tmp_path / "s.yaml"
    code, text, _ = call("init", "srlora", "--out", str(file))
    assert text == f"Recipe: {file}\nRun it: loratlas train {file}\n"
    body = file.read_text()
    assert body[body.index("method:") :] == printed[printed.index("method:") :]
    file.write_text("mine")
    code, _, error = call("init", "lora", "--out", str(file))
    assert code == 2
    assert f"{file} exists already" in error
    assert file.read_text() == "mine"
    assert call("init", "lora", "--out", str(file), "--overwrite")[0] == 0
    assert "method: lora" in file.read_text()


def test_a_recipe_runs_and_the_command_line_comes_before_it(work: list[str], tmp_path: Path) -> None:
    file = tmp_path / "lora.yaml"
    assert call("init", "lora", "--out", str(file))[0] == 0
    words = ["--model", work[1], "--data", work[3], "--steps", "2", "--set", "r=3", "--out", str(tmp_path / "run")]
    code, _, error = call("train", str(file), *words)
    assert code == 0
    assert "13 modules adapted, scaling s = 2.66667, " in error
    assert "an exact LoRA export will have rank 3 (vLLM: --max-lora-rank 8)" in error
    code, text, _ = call("train", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again"), "--json")
    result = json.loads(text)
    assert (result["steps"], result["options"]["r"], result["batch_size"]) == (2, 3, 32)
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_options_of_train_have_the_defaults_of_a_recipe() -> None:
    import dataclasses
    import inspect

    from loratlas.commands import train
    from loratlas.train.recipe import OPTION_MAPS, Recipe

    names = {"accumulation": "gradient_accumulation", "text_column": "text_columns"}
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    shared = {names.get(name, name): p.default for name, p in inspect.signature(train.train).parameters.items()}
    for name in set(defaults) & set(shared) - {"method", "model", "data"}:
        assert (defaults[name] or None) == (shared[name] or None), name
    assert set(defaults) - set(shared) == {"warmup", "weight_decay", "max_grad_norm", *OPTION_MAPS.values()}


def test_try_answers_arguments_and_pipes(trained: Path) -> None:
    code, text, _ = call("try", str(trained), "a good film", "a bad\tbook")
    assert code == 0
    first, base, adapted, second, *_ = text.splitlines()
    assert (first, second) == ("a good film", "a bad  |  book")
    assert base.startswith("  base     ")
    assert adapted.startswith("  adapted  ")
    assert adapted.count("%") == 2
    result = CliRunner().invoke(app, ["try", str(trained), "--json"], input="a good film\n\na bad\tbook\n")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["a good film", ["a bad", "book"]]
    assert rows[0]["adapted"]["label"] in ("yes", "no")
    assert sum(entry["probability"] for entry in rows[0]["base"]["top"]) == pytest.approx(1.0)


def test_a_dialogue_ends_with_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert list(_lines(typing=True)) == ["one", "two"]


def test_methods_as_a_table() -> None:
    code, text, _ = call("methods", "srlora")
    assert code == 0
    assert "2505.12433" in text
    assert "1 listed, 1 implemented" in text
    code, text, _ = call("methods", "--kind", "optimizer")
    assert sum(row.kind == "optimizer" for row in systems()) == text.count(" optimizer ")
    assert "peft-lora" in call("methods", "--baselines")[1]
    assert "2106.09685" in call("methods", "lora")[1]
    assert "did you mean lora" in call("methods", "lorra")[2]
    for width in (80, 120):
        text = CliRunner().invoke(app, ["methods"], env={"COLUMNS": str(width)}).stdout
        assert max(map(len, text.splitlines())) <= width
        assert all(system.slug in text for system in systems())
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
    assert [event["step"] for event in found["fresh"]] == sorted({event["step"] for event in found["events"]})
    assert "by age: 1: 1" in " ".join(text.split())
    code, text, _ = call("export", str(trained), "--to", "lora", "--out", str(tmp_path / "lora"))
    assert code == 0
    said = " ".join(text.split())
    assert "padded to 16, float32, exact" in said
    assert "Loaded again by stock PEFT in a clean process: 13 layers agree" in said
    assert "outputs of the whole model" in said
    assert "not compared" not in said
    assert "--max-lora-rank 16" in said
    assert "servers do not (--heads beside)" in said
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    code, text, _ = call("export", str(trained), "--to", "merged", "--out", str(tmp_path / "merged"), "--json")
    assert json.loads(text)["kind"] == "merged"
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_inspect_shows_the_ranks_over_time(work: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "grown")
    words = ["--steps", "10", "--set", "r=2", "--set", "init_warmup=1", "--set", "incre_interval=2", "--set", "top_h=7"]
    code, _, _ = call("train", "increlora", *work, "--out", out, *words)
    assert code == 0
    code, text, _ = call("inspect", out)
    assert code == 0
    assert "The rank of each layer: 26 in all, 2 on average" in text
    row = next(line for line in text.partition("moved at step")[2].splitlines() if "3:2" in line or "5:2" in line)
    bars = [mark for mark in row if mark in "▁▂▃▄▅▆▇█"]
    assert len(bars) == 20
    assert bars == sorted(bars)
    assert bars[0] < bars[-1]
    found = json.loads(call("inspect", out, "--json")[1])
    assert sum(entry["ranks"][-1] for entry in found["ranks"]) == 26


def test_inspect_by_rank_evaluates_what_export_ships(work: list[str], trained: Path, tmp_path: Path) -> None:
    code, text, _ = call("inspect", str(trained), "--by-rank", "--rank", "1", "--rank", "4")
    assert code == 0
    assert "srlora at every rank" in text
    found = json.loads(call("inspect", str(trained), "--by-rank", "--json")[1])
    final = json.loads((trained / "result.json").read_text())["final"]
    assert [row["rank"] for row in found["rows"]] == found["ranks"]
    assert found["rows"][-1]["metrics"]["accuracy"] == final
    assert found["rows"][0]["relative_error"] > found["rows"][-1]["relative_error"] == 0.0
    alone = tmp_path / "alone"
    shutil.copytree(trained / "adapter", alone)
    code, _, error = call("inspect", str(alone), "--by-rank")
    assert code == 2
    assert "has no config.yaml that would name the data of its run" in error
    again = json.loads(call("inspect", str(alone), "--by-rank", "--json", "--rank", "1", *work[2:4])[1])
    assert again["rows"] == found["rows"][:1]


def test_export_for_a_server(trained: Path, tmp_path: Path) -> None:
    words = ["export", str(trained), "--no-verify", "--check", "vllm"]
    code, text, error = call(*words, "--out", str(tmp_path / "served"))
    assert (code, text) == (2, "")
    assert "vllm would not serve this LoRA" in error
    assert "base_model.model.classifier.weight is not the name" in error
    assert not (tmp_path / "served").exists()
    options = ["--rank", "3", "--heads", "beside", "--dtype", "bfloat16", "--json"]
    code, text, _ = call(*words, "--out", str(tmp_path / "served"), *options)
    report = json.loads(text)
    assert (report["rank"], report["padded_rank"], report["dtype"], report["heads"]) == (
        3,
        8,
        "bfloat16",
        ["classifier"],
    )
    assert report["relative_error"] > 0
    assert report["verification"] is None


MISTAKES = {
    "unknown method": (["train", "srlroa", "--demo"], "no method 'srlroa': did you mean srlora"),
    "planned method": (["train", "m2mkd", "--demo"], "m2mkd is planned and not implemented yet"),
    "no data": (["train", "srlora"], "--model and --data missing"),
    "unknown option": (["train", "srlora", "--demo", "--set", "gama=1"], "no option 'gama': did you mean gamma?"),
    "value out of range": (["train", "srlora", "--demo", "--set", "r_target=2"], "r_target"),
    "no value": (["train", "srlora", "--demo", "--set", "r"], "--set r is not NAME=VALUE"),
    "option of another": (["compare", "lora", "--demo", "--set", "srlora.r=2"], "srlora is not among the methods"),
    "no recipe": (["train", "absent.yaml"], "there is no file absent.yaml"),
    "unknown tracker": (["train", "lora", "--demo", "--report-to", "x"], "transformers reports to no 'x'"),
    "no image or adapter": (["try", "absent", "text"], "there is no directory absent"),
    "resume nowhere": (["train", "srlora", "--demo", "--resume"], "--resume needs --out"),
    "resume a comparison nowhere": (["compare", "lora", "--demo", "--resume"], "--resume needs --out"),
    "no grid": (["compare", "lora", "--demo", "--lr-grid", "1e-3,high"], "--lr-grid 1e-3,high is no list of numbers"),
    "rank of merged": (["export", "x", "--out", "y", "--to", "merged", "--rank", "3"], "merged weights have none"),
    "check of merged": (["export", "x", "--out", "y", "--to", "merged", "--check", "vllm"], "--check is an option of"),
    "data without a use": (["inspect", "absent", "--demo"], "say what to evaluate: add --by-rank"),
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
