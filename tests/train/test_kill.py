"""Runs killed at random moments, while they step and while they save, resume to the very bytes of a whole run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Server:
    """`killing.py`, with one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "killing.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "errors").open("w"),
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self.errors = folder / "errors"

    def run(self, out: Path, *, resume: bool = False, kill_at: tuple[str, int, float] | None = None) -> list[str]:
        """The events of a run; with `kill_at` = (event, n, seconds) it dies so long after the n-th such event."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"out": str(out), "resume": resume}) + "\n")
        self.process.stdin.flush()
        events: list[str] = []
        child = 0
        for line in self.process.stdout:
            word, *rest = line.split()
            if word == "pid":
                child = int(rest[0])
            elif word == "end":
                assert int(rest[0]) == (0 if kill_at is None else -signal.SIGKILL), self.errors.read_text()
                return events
            else:
                events.append(word)
            if kill_at is not None and word == kill_at[0] and events.count(word) == kill_at[1]:
                time.sleep(kill_at[2])
                os.kill(child, signal.SIGKILL)
        raise AssertionError(self.errors.read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait()


def outcome(out: Path) -> dict[str, Any]:
    """All of a run that does not depend on the clock."""
    result = json.loads((out / "result.json").read_text())
    kept = ("history", "evals", "final", "events", "steps", "trainable_parameters", "diverged_at")
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if ".tmp" in str(path) or ".old" in str(path))
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return {**{name: result[name] for name in kept}, "adapter": adapter, "leftovers": names}


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_nothing_is_lost_when_killed(server: Server, tmp_path: Path, kills: int) -> None:
    events = server.run(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert expected["leftovers"] == []
    moments = random.Random(kills)
    inside = 0
    for number in range(kills):
        out = tmp_path / str(number)
        event = ("step", "sync")[number % 2]
        server.run(out, kill_at=(event, moments.randint(1, events.count(event)), moments.uniform(0, 0.02)))
        inside += bool(list(out.rglob(".*.tmp")))
        server.run(out, resume=True)
        assert outcome(out) == expected, f"kill {number}"
    assert inside >= kills // 4
