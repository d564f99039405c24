"""Replays every golden file whose system has a replay function in tests/replay/<slug>.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

OWN = Path(__file__).parent / "golden"
REPLAYS = Path(__file__).parent / "replay"
sys.path.insert(0, str(REPLAYS))  # what replays share lies beside them


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden-dir") or OWN)
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden-dir {folder} is not a directory")
    files = [
        file
        for file in sorted(folder.glob("*/*.safetensors"))
        if (REPLAYS / f"{file.parent.name.replace('-', '_')}.py").exists()
    ]
    ids = [f"golden-{file.parent.name}-{file.stem}" for file in files]
    metafunc.parametrize("file", files, ids=ids)


def test_replay(file: Path) -> None:
    load(file.parent.name).replay(file)


def load(slug: str) -> ModuleType:
    path = REPLAYS / f"{slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"replay_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
