"""The study of SRLoRA measures what the library ships."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from loratlas.adapters.srlora import GRADIENT

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found: dict[str, Any] = runpy.run_path(str(BENCHMARKS / "srlora_study.py"))["ARMS"]
    return found


def test_the_arm_that_won_is_the_preset(arms: dict[str, Any]) -> None:
    assert arms["gradient-short"] == ("srlora", GRADIENT)
    assert arms["gradient-short-5r"] == ("srlora", {**GRADIENT, "multiple": 5})
