"""Two processes decide alike: weights, scores and selections are bit-equal after several events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


def on_two_ranks(script: str, *arguments: str) -> list[list[str]]:
    """The lines 'rank N ...' that `script` prints, as words, in the order of the ranks."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", "--master_port=0"]
    path = str(Path(__file__).with_name(script))
    done = subprocess.run(
        [sys.executable, *words, "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", path, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines() if line.startswith("rank "))
    assert [line[1] for line in lines] == ["0", "1"]
    return lines


@pytest.mark.parametrize("fuse_mode", ["difference", "inplace"])
def test_two_ranks_stay_bit_equal(fuse_mode: str) -> None:
    lines = on_two_ranks("ranks.py", fuse_mode)
    assert lines[0][2:] == lines[1][2:]
    assert int(lines[0][3]) == 4


def test_calibration_is_the_mean_over_all_steps_of_all_ranks() -> None:
    lines = on_two_ranks("ranks_calibrate.py")
    assert lines[0][2] == lines[1][2]
