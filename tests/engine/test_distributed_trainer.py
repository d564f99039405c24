"""transformers' Trainer on two ranks: DDP and FSDP2 take the same steps, and an FSDP2 run resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import two_ranks
from peft import PeftModel
from safetensors.torch import load_file
from toys import views
from trainer_ranks import STEPS, STOP, Task

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trainer")
    two_ranks("trainer_ranks.py", made)
    return made


@pytest.mark.parametrize(
    ("name", "like"), [("ddp-1", "ddp-0"), ("fsdp-1", "fsdp-0"), ("resumed-0", "fsdp-0"), ("resumed-1", "fsdp-0")]
)
def test_runs_are_bit_equal(folder: Path, name: str, like: str) -> None:
    found, expected = (load_file(folder / f"{which}.safetensors") for which in (name, like))
    assert int(expected["0.events"]) == 3
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_fsdp2_takes_the_steps_of_ddp(folder: Path) -> None:
    """Up to rounding in fp32: the norm for clipping and the accumulated batches are summed in another order."""
    ddp, fsdp = (load_file(folder / f"{name}-0.safetensors") for name in ("ddp", "fsdp"))
    for key, value in ddp.items():
        torch.testing.assert_close(fsdp[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("name", "where", "steps"),
    [("ddp", "final", STEPS), ("fsdp", "final", STEPS), ("resumed", "final", STEPS), ("fsdp", "checkpoint-5", STOP)],
)
def test_the_saved_adapter_is_whole(folder: Path, name: str, where: str, steps: int) -> None:
    saved = views(PeftModel.from_pretrained(Task(), folder / name / where))
    trained = load_file(folder / f"{name}-0.safetensors")
    for number, t in enumerate(saved):
        assert int(t.step) == steps
        for key in ("A", "B", "A0", "B0", "HA", "HB", "IA", "QB", "RA", "log"):
            assert torch.equal(getattr(t, key), trained[f"{number}.{key}"]) == (steps == STEPS), key
