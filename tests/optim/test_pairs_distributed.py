"""Two ranks with different data take equal steps, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "engine"))

from launch import two_ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_both_ranks_are_bit_equal_and_shards_are_refused() -> None:
    two_ranks(Path(__file__).with_name("pair_ranks.py"))
