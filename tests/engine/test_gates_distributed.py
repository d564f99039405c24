"""Two ranks close the same gates, keep the same pairs and choose the same modules as one process on all the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gate_ranks import CONFIGS
from launch import two_ranks
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gates")
    two_ranks("gate_ranks.py", path)
    return path


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_are_one_process(folder: Path, name: str, how: str) -> None:
    one = load_file(folder / f"{name}-one-0.safetensors")
    ranks = [load_file(folder / f"{name}-{how}-{rank}.safetensors") for rank in (0, 1)]
    assert one.keys() == ranks[0].keys() == ranks[1].keys()
    for key, value in one.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), key
        torch.testing.assert_close(
            ranks[0][key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_something_has_changed(folder: Path, name: str) -> None:
    found = load_file(folder / f"{name}-ddp-0.safetensors")

    def both(tensor: str) -> list[Tensor]:
        return [found[f"{layer}.{tensor}"] for layer in (0, 1)]

    if name == "sora":
        assert 0 < sum(int(gates.count_nonzero()) for gates in both("gates")) < 10
    elif name == "codyra":
        assert [int(tasks) for tasks in both("tasks")] == [1, 1]
        assert 0 < sum(len(kept) for kept in both("HA")) < 10
    else:
        assert sorted(map(int, both("role"))) == ([1, 2] if name == "diffora" else [1, 3])
