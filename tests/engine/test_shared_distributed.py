"""Random bases of two ranks are those of rank 0, and what they save together is loaded in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import two_ranks
from peft import PeftModel
from safetensors.torch import load_file
from toys import Toy, inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    two_ranks("shared_ranks.py", path)
    return path


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["NolaConfig", "RandLoraConfig"])
def test_ranks_share_their_bases(folder: Path, how: str, name: str) -> None:
    ranks = [load_file(folder / f"{how}-{name}-{rank}.safetensors")["y"] for rank in (0, 1)]
    assert torch.equal(*ranks)
    again = PeftModel.from_pretrained(Toy(dtype=torch.float64), folder / f"{how}-{name}")
    torch.testing.assert_close(again(inputs(dtype=torch.float64)), ranks[0], rtol=1e-12, atol=1e-12)
