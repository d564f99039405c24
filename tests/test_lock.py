"""One writer a directory, and no lock outlives its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loratlas import UserError, lock
from loratlas.lock import locked

HOLD = """
import sys
sys.modules["loratlas_command"] = sys  # the package then stays light
from loratlas.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def enter(path: Path) -> None:
    with locked(path):
        pass


def test_the_second_writer_is_told_of_the_first(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        said = rf"run is being written by process {os.getpid()} on {socket.gethostname()}: wait for it to end"
        with pytest.raises(UserError, match=said):
            enter(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"written by process {other.pid} on"):
            enter(tmp_path)
        other.kill()
    enter(tmp_path)


def test_without_locks_there_is_nothing_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with locked(tmp_path):
        enter(tmp_path)
    assert not any(tmp_path.iterdir())
