"""benchmarks/step.py runs, and its JSON and the site's tables hold what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script by its path; what it imports from its own folder is forgotten afterwards."""
    known, threads = set(sys.modules), torch.get_num_threads()

    def script(path: str) -> Any:
        monkeypatch.syspath_prepend(str((ROOT / path).parent))
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield script
    torch.set_num_threads(threads)
    for name in {"arms", "paired", "step", "step_options", "curves", "markdown_table"} - known:
        sys.modules.pop(name, None)


def test_a_quick_run(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    step, out = load("benchmarks/step.py"), tmp_path / "step.json"
    app = typer.Typer()
    app.command()(step.main)
    command = ["--quick", "--rounds", "1", "--method", "svfit", "--out", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found = json.loads(out.read_text())
    fp32, bf16, *dropped = found["data"]
    assert set(fp32["arms"]) == {*step.ARMS, "svfit"}
    assert [set(each["arms"]) for each in dropped] == 2 * [{"peft", "lora", "svfit"}]
    assert fp32["lora_against_peft"]["loss"] < 1e-6
    assert fp32["lora_against_peft"]["gradients"] < 1e-6
    assert bf16["lora_against_peft"]["lora_to_fp32"] < 1.5 * bf16["lora_against_peft"]["peft_to_fp32"]
    assert all(len(fp32["arms"][name]["event_seconds"]) == 6 for name in ("srlora", "srlora-inplace"))
    assert bf16["arms"]["lora"]["saved_bytes"] < bf16["arms"]["peft"]["saved_bytes"]

    site = load("docs/results.py")
    monkeypatch.setattr(site, "RESULTS", tmp_path)
    page = site.results("step")
    assert all(bar["claim"] in page for bar in found["bars"])


def test_what_has_no_dropout_stays_out_of_those_settings(load: Any, tmp_path: Path) -> None:
    import typer

    step, out = load("benchmarks/step.py"), tmp_path / "step.json"
    app = typer.Typer()
    app.command()(step.main)
    chosen = ["--setting", "tiny-fp32", "--setting", "tiny-fp32-dropout", "--arm", "lora", "--method", "bone"]
    command = ["--quick", "--rounds", "1", *chosen, "--out", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    arms = [set(each["arms"]) for each in json.loads(out.read_text())["data"]]
    assert arms == [{"lora", "peft-bat", "bone"}, {"lora"}]


def test_methods_beside_the_lora_of_as_many_parameters(load: Any, tmp_path: Path) -> None:
    import typer

    methods, out = load("benchmarks/step_methods.py"), tmp_path / "step_methods.json"
    app = typer.Typer()
    app.command()(methods.main)
    wanted = ["lora-ga", "lora-sb", "salt", "increlora"]  # the first two start from a calibration
    chosen = [word for name in wanted for word in ("--method", name)]
    command = ["--quick", "--rounds", "1", "--dtype", "fp32", *chosen, "--out", str(out)]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found = json.loads(out.read_text())
    (setting,) = found["data"]
    arms = setting["arms"]
    each_rank = arms["lora, r = 8"]["parameters"] // 8
    assert arms["lora-ga"]["parameters"] == 8 * each_rank
    assert {name: arms[name]["against"] for name in ("lora-ga", "lora-sb")} == {
        "lora-ga": "lora, r = 8",
        "lora-sb": "lora, r = 1",
    }
    assert arms["increlora"]["against"] == "lora, r = 8"  # the rank that it may come to
    near = arms["salt"]["against"]
    assert abs(arms["salt"]["parameters"] - arms[near]["parameters"]) <= each_rank / 2
    assert len(found["bars"]) == len(wanted)


def test_an_unknown_setting_names_the_known_ones(load: Any) -> None:
    step = load("benchmarks/step.py")
    with pytest.raises(step.typer.BadParameter, match=r"no setting 'd385'.*d384-fp32"):
        step._chosen(step.SETTINGS, ["d385"])
