"""Two ranks have the same subspaces and weights, to the bit, even where each of them would have chosen others."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from launch import two_ranks


def test_ranks_stay_together(tmp_path: Path) -> None:
    two_ranks("../optim/subspace_ranks.py", tmp_path)
    for name in ("galore", "fira", "dct"):
        one, other = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(one[key], other[key]) for key in one), name
