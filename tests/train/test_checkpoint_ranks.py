"""Two ranks write one checkpoint together and go on from it bit for bit, each with its own generators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    script = Path(__file__).with_name("checkpoint_ranks.py")
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", "--master_port=0"]
    done = subprocess.run(
        [sys.executable, *words, "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    parts = "checkpoint-9 generators-0.json generators-1.json"
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank} True {parts}" for rank in (0, 1)]
