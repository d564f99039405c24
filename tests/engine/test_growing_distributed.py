"""Growth on two ranks: bit-equal on both, and what one process does with the batches of both as micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import two_ranks
from safetensors.torch import load_file
from toys import inputs

METHODS = ("increlora", "triadaptlora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growing")
    two_ranks("growing_ranks.py", path)
    return path


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_both_ranks_grow_alike(folder: Path, name: str, how: str) -> None:
    first, second = (load_file(folder / f"{name}-{how}-{rank}.safetensors") for rank in (0, 1))
    assert int(first["0.rank"]) + int(first["1.rank"]) == 8
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    from growing_ranks import train

    alone = train(name, "one-fsdp2" if how == "fsdp2" else "one", [inputs(dtype=torch.float64, seed=s) for s in (0, 1)])
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


def test_the_penalty_is_refused_where_parameters_are_sharded(folder: Path) -> None:
    said = (folder / "said-0.txt").read_text()
    assert "increlora adds a term to the loss that needs whole parameters" in said
    assert "or configure it without that term" in said
