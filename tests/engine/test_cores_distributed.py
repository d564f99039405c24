"""LaMDA's freezing on two ranks is that of one process, without a word to DDP about tensors that stop training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import two_ranks
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cores")
    two_ranks("core_ranks.py", path)
    return path


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_freezing_needs_no_agreement(folder: Path, how: str) -> None:
    one = load_file(folder / "one-0.safetensors")
    ranks = [load_file(folder / f"{how}-{rank}.safetensors") for rank in (0, 1)]
    for name, value in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert one["0.frozen"].all()
    assert one["states"] == 2  # the cores of two layers
