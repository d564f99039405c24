"""Two processes decide alike, shards or not, and nothing of what they hold is lost (`ranks.py` is what they run)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from launch import two_ranks
from peft import PeftModel
from ranks import RESETS, STEPS
from safetensors.torch import load_file
from torch import Tensor
from toys import Toy, adamw, adapted, inputs

from loratlas import UserError, attach
from loratlas.engine.distributed import whole_state_dict

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    two_ranks("ranks.py", made)
    return made


def read(folder: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


SAME_ON_BOTH = {
    **{f"{setup}-{reset}": 3 for setup in ("ddp", "fsdp") for reset in RESETS},
    **{f"{setup}-one": 4 for setup in ("ddp", "fsdp")},
    **{f"{setup}-packed": 9 for setup in ("ddp", "fsdp")},
    **{f"{setup}-gradient": 3 for setup in ("ddp", "fsdp")},
    **dict.fromkeys(("ddp-inplace", "hsdp", "columns", "torn", "ddp-start", "fsdp-start", "renewed", "resumed"), 3),
    **dict.fromkeys(("overflow-False", "overflow-True"), 3),
}


@pytest.mark.parametrize("name", SAME_ON_BOTH)
def test_both_ranks_are_bit_equal_after_all_events(folder: Path, name: str) -> None:
    first, second = read(folder, name, 0), read(folder, name, 1)
    assert_equal(first, second)
    assert [int(first[f"{layer}.events"]) for layer in (0, 1)] == [SAME_ON_BOTH[name]] * 2
    assert len(first["0.log"]) >= SAME_ON_BOTH[name]


@pytest.mark.parametrize("name", [*RESETS, "one", "packed", "start", "gradient"])
def test_shards_do_not_change_a_bit(folder: Path, name: str) -> None:
    assert_equal(read(folder, f"fsdp-{name}"), read(folder, f"ddp-{name}"))


def test_shards_may_lie_otherwise(folder: Path) -> None:
    assert_equal(read(folder, "hsdp"), read(folder, "fsdp-keep"))
    assert_equal(read(folder, "columns"), read(folder, "fsdp-corrected"))


def test_two_ranks_are_one_process_on_both_batches(folder: Path) -> None:
    """Up to the order of one sum over the batch, in fp32."""
    one, two = read(folder, "single"), read(folder, "fsdp-keep")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_treatments_of_moments_differ(folder: Path) -> None:
    assert len({float(read(folder, f"fsdp-{reset}")["0.A"].sum()) for reset in RESETS}) == len(RESETS)


def test_a_start_is_that_of_rank_0(folder: Path) -> None:
    """Although rank 1 had found opposite signs and a smaller reservoir; both start where one process does."""
    assert_equal(read(folder, "ddp-start", 1), read(folder, "ddp-keep"))


def test_a_choice_is_that_of_rank_0(folder: Path) -> None:
    """Although rank 1 would have chosen other pairs at every event."""
    assert_equal(read(folder, "torn", 1), read(folder, "fsdp-keep"))


def test_an_interrupted_run_goes_on_bit_for_bit(folder: Path) -> None:
    assert_equal(read(folder, "resumed"), read(folder, "fsdp-keep"))


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_is_no_step_on_any(folder: Path, fused: bool) -> None:
    found = read(folder, f"overflow-{fused}")
    assert int(found["0.step"]) == STEPS - 1
    assert int(found["0.A.step"]) == STEPS - 1
    assert all(torch.isfinite(value).all() for value in found.values())


def test_the_slices_of_all_ranks_are_in_the_file(folder: Path) -> None:
    found = load_file(folder / "marked" / "adapter_model.safetensors")
    prefix = "base_model.model."
    for name, rows in (("first.ATLAS_SRLORA_A", 5), ("first.ATLAS_SRLORA_B", 16), ("second.weight", 14)):
        by_row = [1.0 if row < (rows + 1) // 2 else 2.0 for row in range(rows)]  # rank 0 has the upper half, rounded up
        tensor = found[prefix + name]
        assert torch.equal(tensor, torch.tensor(by_row)[:, None].expand_as(tensor)), name
    assert not any("base_layer" in name for name in found)


def test_a_sharded_run_is_loaded_in_one_process(folder: Path) -> None:
    model = PeftModel.from_pretrained(Toy(), folder / "stopped")
    saved = read(folder, "output")
    assert int(saved["0.events"]) > 0
    assert torch.equal(model(saved["x"]), saved["y"])


def test_whole_tensors_of_a_model_that_is_not_sharded(tmp_path: Path) -> None:
    model = adapted("srlora", r=5, modules_to_save=["second"], target_modules=["first"])
    model.save_pretrained(tmp_path / "with", state_dict=whole_state_dict(model))
    model.save_pretrained(tmp_path / "without")
    assert_equal(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without")))


FSDP1 = r"FSDP1 \(FullyShardedDataParallel\) flattens parameters.* use FSDP2"
REFUSED = {
    "other rank": r"module base_model\.model\.first has another rank r on some processes: set its rank in rank_pattern",
    "sharded start": r"module base_model\.model\.first started differently on some ranks.* call \S+same_start\(model\)",
    "parts": r"2 tensors of the adapter are sharded, .*ATLAS_SRLORA_A.*: pass save_pretrained .*whole_state_dict",
    "inplace": r"fuse_mode='inplace' needs a dense working copy .* use fuse_mode='difference'",
    "half": r"in torch\.bfloat16 and its fixed tensors in .* leave MixedPrecisionPolicy\.param_dtype unset",
    "loss": r"srlora adds a term to the loss .* use DistributedDataParallel",
    **{f"{what} {original}": FSDP1 for what in ("flat", "inside") for original in (True, False)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses_what_cannot_work(folder: Path, name: str) -> None:
    for rank in (0, 1):
        said = json.loads((folder / f"said-{rank}.json").read_text())
        assert re.search(REFUSED[name], said[name]), said[name]


@pytest.fixture
def accelerator() -> Iterator[None]:
    """The state that accelerate's wrappers of optimizers look for."""
    Accelerator(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerator")
def test_deepspeed_is_refused() -> None:
    model = adapted("srlora")
    torch_optimizer = adamw(model)
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    zero.optimizer, zero.param_groups = torch_optimizer, torch_optimizer.param_groups
    for optimizer in (DeepSpeedOptimizerWrapper(zero), DeepSpeedOptimizerWrapper(torch_optimizer), zero):
        with pytest.raises(UserError, match=r"^DeepSpeed keeps .* train with DistributedDataParallel or FSDP2 instead"):
            attach(model, optimizer, total_steps=10)
    for nothing in (object(), None, AcceleratedOptimizer(object(), device_placement=False)):
        with pytest.raises(UserError, match=r"attach needs a torch\.optim\.Optimizer, but got (object|NoneType)"):
            attach(model, nothing, total_steps=10)  # type: ignore[arg-type]
    model(inputs()).sum().backward()
    torch_optimizer.step()  # nothing was hooked on
    wrapped = AcceleratedOptimizer(torch_optimizer, device_placement=False)
    assert int(attach(model, wrapped, total_steps=10).groups[0].views[0].step) == 0
    torch_optimizer.step()
    assert int(attach(model, torch_optimizer).groups[0].views[0].step) == 1


def test_calibration_is_the_mean_over_all_steps_of_all_ranks() -> None:
    two_ranks("ranks_calibrate.py")
