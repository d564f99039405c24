"""Starts a script on two gloo ranks over the loopback interface, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def two_ranks(script: str | Path, *arguments: object) -> None:
    """Run `script`, a path from this folder or an absolute one, under torchrun; fails with its standard error."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, *words, str(Path(__file__).parent / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
