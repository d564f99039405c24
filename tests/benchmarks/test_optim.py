"""benchmarks/optim.py runs, says what it leaves out, and knows how large a state is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    threads, had_it = torch.get_num_threads(), "paired" in sys.modules
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("optim_benchmark", ROOT / "benchmarks" / "optim.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "optim_benchmark", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    if not had_it:
        sys.modules.pop("paired", None)


def test_a_quick_run(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    app = typer.Typer()
    app.command()(script.main)
    out = tmp_path / "optim.json"
    arms = [word for name in script.ARMS if name != "galore-8bit" for word in ("--arm", name)]
    done = CliRunner().invoke(app, ["--quick", "--rounds", "1", *arms, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(out.read_text())
    assert set(found["data"]) == set(script.ARMS) - {"galore-torch", "galore-8bit"}
    size = {name: row["state_bytes"] for name, row in found["data"].items()}
    # 4 (m r + 2 n r) for each of the four matrices of width 48, and one number for each of Fira's
    assert size["fira"] == size["galore"] + 4 * 4
    m, n, r = (4 * 48, 48 + 144 + 192 + 192, 8)
    dense = size["adamw"] - 8 * 48 * n
    assert size["galore"] == dense + 4 * (m * r + 2 * n * r)
    assert size["dct-adamw"] == dense + 4 * (4 * r + 2 * n * r)
    claims = [bar["claim"] for bar in found["bars"]]
    assert claims == ["refresh, DCT-AdamW / SVD of galore"]


def test_an_unknown_arm_names_the_known_ones(script: Any) -> None:
    with pytest.raises(typer.BadParameter, match=r"no arm 'adam'.*galore-torch"):
        script.measure(script.Setting(), ["adam"], 1)
