"""Checkpoints of plain loops: exact for every optimizer and adapter, whole or absent, and each fault one sentence."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau, SequentialLR
from toys import TARGETS, Toy, adamw, adapted, config, inputs, raw, train, trainable

from loratlas import UserError, attach, load_checkpoint, newest_checkpoint, save_checkpoint
from loratlas.files import DiskFull
from loratlas.train.state import read_state, write_state

OURS = ("srlora", "srlora-inplace", "pissa")
PEFTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.2, target_modules=TARGETS),
    "lora-with-bias": lambda: peft.LoraConfig(r=4, bias="all", target_modules=["first"], modules_to_save=["second"]),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["second"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["first"]),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "amsgrad": lambda m: torch.optim.Adam(trainable(m), lr=1e-2, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(trainable(m), lr=1e-2, momentum=0.9, nesterov=True),
    "nadam": lambda m: torch.optim.NAdam(trainable(m), lr=1e-2),
    "adagrad": lambda m: torch.optim.Adagrad(trainable(m), lr=1e-2),
    "adafactor": lambda m: torch.optim.Adafactor(trainable(m), lr=1e-2),
    "lbfgs": lambda m: torch.optim.LBFGS(trainable(m), lr=1e-1, max_iter=3, history_size=3),
}


def build(name: str) -> PeftModel:
    model = get_peft_model(Toy(), PEFTS[name]()) if name in PEFTS else adapted(name)
    assert isinstance(model, PeftModel)
    return model


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps `first` to `last` of 20 on data that need every generator."""
    attach(model, optimizer, total_steps=20)
    for _ in range(first, last + 1):
        x = inputs() * (random.random() + np.random.rand()) + torch.randn(6, 12)

        def loss(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            value = model(x).square().mean()
            value.backward()
            return value

        loss()
        optimizer.step(loss if isinstance(optimizer, torch.optim.LBFGS) else None)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> list[bytes]:
    """Bytes of the model, of its saved adapter, and of the optimizer."""
    model.save_pretrained(folder)
    write_state(folder, "optimizer", optimizer.state_dict())
    files = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json")
    return [*(raw(tensor) for tensor in model.state_dict().values()), *((folder / file).read_bytes() for file in files)]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "adamw") for name in (*OURS, *PEFTS)), *(("srlora", name) for name in OPTIMIZERS if name != "adamw")],
)
def test_a_resumed_loop_ends_where_the_whole_one_ends(name: str, optimizer: str, tmp_path: Path) -> None:
    ends = []
    for cut in (None, 13):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(1)
        model = build(name)
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(2)
        steps = OPTIMIZERS[optimizer](model)
        loop(model, steps, 1, cut or 20)
        if cut:
            save_checkpoint(tmp_path / "out", model, steps, step=cut, extra={"seen": (cut, torch.arange(3))})
            random.seed(3)
            np.random.seed(3)
            torch.manual_seed(3)
            model = build(name)
            steps = OPTIMIZERS[optimizer](model)
            resumed = load_checkpoint(tmp_path / "out", model, steps)
            assert resumed.step == resumed.extra["seen"][0] == cut
            assert torch.equal(resumed.extra["seen"][1], torch.arange(3))
            loop(model, steps, cut + 1, 20)
        ends.append(everything(model, steps, tmp_path / str(cut)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("fuse_mode", ["difference", "inplace"])
def test_every_step_is_as_good_to_resume_from(fuse_mode: str, tmp_path: Path) -> None:
    def start() -> tuple[PeftModel, torch.optim.Optimizer]:
        model = adapted("srlora", fuse_mode=fuse_mode)
        return model, adamw(model)

    model, optimizer = start()
    for step in range(1, 21):
        if step > 1:
            attach(model, optimizer).remove()  # each step as a loop of its own, which is what resuming makes of it
        loop(model, optimizer, step, step)
        save_checkpoint(tmp_path, model, optimizer, step=step)
    end = everything(model, optimizer, tmp_path / "end")
    for step in range(1, 20):
        model, optimizer = start()
        assert load_checkpoint(tmp_path / f"checkpoint-{step}", model, optimizer).step == step
        loop(model, optimizer, step + 1, 20)
        assert everything(model, optimizer, tmp_path / "again") == end, f"from step {step}"


@pytest.mark.gpu
def test_generators_of_the_device_are_kept(tmp_path: Path) -> None:
    model = build("pissa").to("cuda")
    optimizer = adamw(model)
    save_checkpoint(tmp_path, model, optimizer, step=1)
    expected = torch.rand(4, device="cuda")
    load_checkpoint(tmp_path, model, optimizer)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


@pytest.mark.parametrize("make", [
    lambda o: CosineAnnealingLR(o, 10),
    lambda o: MultiStepLR(o, [2, 5, 5]),
    lambda o: SequentialLR(o, [MultiStepLR(o, [1]), CosineAnnealingLR(o, 7)], [3]),
    lambda o: ReduceLROnPlateau(o, patience=1),
])  # fmt: skip
def test_schedulers_go_on(make: Callable[[Any], Any], tmp_path: Path) -> None:
    def rates(scheduler: Any, optimizer: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*((1.0,) if isinstance(scheduler, ReduceLROnPlateau) else ()))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    model = build("lora-with-bias")
    optimizer = adamw(model)
    scheduler = make(optimizer)
    rates(scheduler, optimizer, 3)
    save_checkpoint(tmp_path, model, optimizer, scheduler, step=3)
    expected = rates(scheduler, optimizer, 9)
    again = adamw(model)
    fresh = make(again)
    load_checkpoint(tmp_path, model, again, fresh)
    assert rates(fresh, again, 9) == expected
    assert len(set(expected)) > 1
    with pytest.raises(UserError, match="was saved with a scheduler: load it with one too"):
        load_checkpoint(tmp_path, model, adamw(model))


class Master(torch.optim.Optimizer):
    """Keeps fp32 copies of bf16 parameters and a count of bytes, as mixed-precision optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("master", p.detach().float().clone())
                state.setdefault("codes", torch.zeros(p.shape, dtype=torch.uint8))
                state["codes"] += 1
                state["master"] -= 1e-4 * p.grad.float()
                p.data.copy_(state["master"])


def test_state_of_another_dtype_than_its_parameter_keeps_its_bits(tmp_path: Path) -> None:
    model = adapted("lora", dtype=torch.bfloat16)
    for p in trainable(model):
        p.data = p.data.bfloat16()
    optimizer = Master(trainable(model), {"lr": 1.0})
    train(model, inputs(dtype=torch.bfloat16), steps=3, optimizer=optimizer)
    save_checkpoint(tmp_path, model, optimizer, step=3)
    again = Master(trainable(model), {"lr": 1.0})
    load_checkpoint(tmp_path, model, again)
    for p in trainable(model):
        for key, value in optimizer.state[p].items():
            assert again.state[p][key].dtype == value.dtype
            assert torch.equal(again.state[p][key], value)


def test_what_trains_beside_the_adapter_is_kept(tmp_path: Path) -> None:
    def model() -> PeftModel:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
        made = get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
        made.base_model.model[2].weight.requires_grad_(True)  # outside PEFT's knowledge
        return made

    first = model()
    optimizer = adamw(first)
    for _ in range(3):
        first(inputs()).square().mean().backward()
        optimizer.step()
    save_checkpoint(tmp_path, first, optimizer, step=3)
    second = model()
    load_checkpoint(tmp_path, second, adamw(second))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_several_adapters_and_wrappers(tmp_path: Path) -> None:
    def model() -> PeftModel:
        made = adapted("srlora")
        made.add_adapter("other", config("srlora", r=2))
        made.base_model.set_adapter(["default", "other"])
        return made

    first = model()
    wrapped = torch.compile(first, backend="eager")
    optimizer = adamw(first)
    train(first, inputs(), steps=10, optimizer=optimizer)
    path = save_checkpoint(tmp_path, wrapped, optimizer, step=10)
    assert (path / "other" / "adapter_model.safetensors").is_file()
    second = model()
    load_checkpoint(tmp_path, second, adamw(second))
    assert torch.equal(first(inputs()), second(inputs()))


def test_state_of_any_shape_comes_back_as_it_was(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    value = {
        "a": (1, 2.5, None, True, "x", (float("inf"), float("-inf"))),
        7: [base, base.t(), base[0], torch.tensor(3), torch.zeros(0), torch.ones(2, dtype=torch.bool)],
        "a.b": {"$odd": np.arange(4, dtype=np.uint32), "flag": np.float64(0.1), "type": torch.bfloat16},
        "a_": {"b": torch.ones(1)},
    }
    write_state(tmp_path, "x", value)
    found = read_state(tmp_path, "x")
    assert found["a"] == value["a"]
    for a, b in zip(found[7], value[7], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert found["a.b"]["$odd"].dtype == np.uint32
    assert found["a.b"]["$odd"].tolist() == [0, 1, 2, 3]
    assert found["a.b"]["flag"] == 0.1
    assert found["a.b"]["type"] is torch.bfloat16
    assert torch.equal(found["a_"]["b"], torch.ones(1))
    for bad, what in (
        ({"state": {0: {"fn": print}}}, r"x\.state\.0\.fn is a builtin_function_or_method, which safetensors and JSON"),
        ([torch.zeros(2, device="meta")], r"x\.0 is a tensor that a checkpoint cannot hold .*meta"),
        ([torch.eye(2).to_sparse()], r"x\.0 is a tensor that a checkpoint cannot hold .*sparse"),
        ({"s": {1, 2}}, r"x\.s is a set"),
    ):
        with pytest.raises(UserError, match=what):
            write_state(tmp_path, "x", bad)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, PeftModel, torch.optim.Optimizer]:
    """Checkpoints 1, 2 and 3."""
    model = adapted("lora")
    optimizer = adamw(model)
    save = {step: lambda step=step: save_checkpoint(tmp_path, model, optimizer, step=step) for step in (1, 2, 3)}
    train(model, inputs(), steps=3, optimizer=optimizer, each=lambda step: save[step]())
    return tmp_path, model, optimizer


def damage(how: str, path: Path) -> None:
    victim = path / "optimizer.safetensors"
    content = victim.read_bytes()
    if how == "missing":
        victim.unlink()
    elif how == "short":
        victim.write_bytes(content[:-1])
    elif how == "flipped":
        victim.write_bytes(content[:-9] + bytes([content[-9] ^ 16]) + content[-8:])
    elif how == "unmarked":
        (path / "COMPLETE").unlink()
    elif how == "marker":
        (path / "COMPLETE").write_text((path / "COMPLETE").read_text()[:40])
    elif how == "unfinished":
        path.rename(path.parent / ".checkpoint-3.abcdefgh.tmp")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", r"checkpoint-3 \(optimizer.safetensors is missing\)"),
        ("short", r"checkpoint-3 \(optimizer.safetensors has \d+ bytes instead of \d+\)"),
        ("flipped", r"checkpoint-3 \(optimizer.safetensors is damaged\)"),
        ("unmarked", r"checkpoint-3 \(no COMPLETE in it\)"),
        ("marker", r"checkpoint-3 \(COMPLETE is damaged\)"),
        ("unfinished", r"\.checkpoint-3\.abcdefgh\.tmp \(its writing was interrupted\)"),
    ],
)
def test_partial_and_damaged_ones_are_skipped_in_one_line(
    three: Any, how: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model, _ = three
    damage(how, folder / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(folder, model, adamw(model)).step == 2
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().endswith("; the newest complete checkpoint is checkpoint-2.")
    assert re.search(said, caplog.records[0].getMessage())
    if how != "unfinished":
        with pytest.raises(UserError, match="checkpoint-3 is not complete"):
            load_checkpoint(folder / "checkpoint-3", model, adamw(model))
    model2 = adapted("lora")
    save_checkpoint(folder, model2, adamw(model2), step=3)
    assert newest_checkpoint(folder) == folder / "checkpoint-3"
    assert not list(folder.glob(".*"))


def test_a_checkpoint_moved_aside_by_a_save_that_died_is_found(three: Any) -> None:
    folder, model, optimizer = three
    aside = folder / ".checkpoint-3.abcdefgh.old"
    aside.mkdir()
    (folder / "checkpoint-3").rename(aside / "checkpoint-3")
    assert load_checkpoint(folder, model, adamw(model)).step == 3
    save_checkpoint(folder, model, optimizer, step=4)
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_rotation_keeps_the_newest(three: Any, tmp_path: Path) -> None:
    folder, model, optimizer = three
    (folder / "checkpoint-0").mkdir()  # not ours
    save_checkpoint(folder, model, optimizer, step=4, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-0", "checkpoint-3", "checkpoint-4"]
    save_checkpoint(folder, model, optimizer, step=2, keep=1)  # a run that went back
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-0", "checkpoint-2"]


class Full:
    """Stands for the disk: it is full from the `after`-th fsync on."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.real = os.fsync

    def __call__(self, handle: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real(handle)


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_full_disk_leaves_the_earlier_checkpoint(three: Any, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, optimizer = three
    before = sorted(folder.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Full(after))
        with pytest.raises(DiskFull) as caught:
            save_checkpoint(folder, model, optimizer, step=4, keep=1)
    assert str(caught.value) == (
        f"the disk is full (No space left on device): {folder / 'checkpoint-4'} could not be written; checkpoint-3 is "
        "complete and untouched: free some space and resume from it."
    )
    assert sorted(folder.rglob("*")) == before
    assert load_checkpoint(folder, model, adamw(model)).step == 3


def test_a_limit_on_file_size_is_a_full_disk_too(three: Any) -> None:
    folder, model, optimizer = three
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # met first by what safetensors writes in Rust
    try:
        with pytest.raises(DiskFull, match=r"File too large.*checkpoint-3 is complete"):
            save_checkpoint(folder, model, optimizer, step=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_checkpoint(folder) == folder / "checkpoint-3"


def test_a_checkpoint_of_something_else_is_refused_before_anything_changes(three: Any, tmp_path: Path) -> None:
    folder, model, optimizer = three
    optimizer.step()
    with torch.no_grad():
        for p in trainable(model):
            p += 1
    before = [raw(p) for p in trainable(model)]
    other = adapted("lora", lora_dropout=0.5)
    with pytest.raises(UserError, match=r"configuration of adapter 'default': lora_dropout was 0\.0 and is 0\.5\."):
        load_checkpoint(folder, other, adamw(other))
    other = adapted("srlora", r=2)
    with pytest.raises(UserError, match=r"peft_type was 'ATLAS_LORA' and is 'ATLAS_SRLORA'.*r was 4 and is 2"):
        load_checkpoint(folder, other, adamw(other))
    optimizer = adamw(other)
    attach(other, optimizer, total_steps=3)
    with pytest.raises(UserError, match="call load_checkpoint before attach"):
        load_checkpoint(folder, other, optimizer)
    with pytest.raises(UserError, match=r"optimizer of 4 parameters, this one has 3: build model and optimizer"):
        load_checkpoint(folder, model, torch.optim.AdamW(trainable(model)[1:]))
    with pytest.raises(UserError, match=r"has \S*first\S*A\S* \(4, 12\) where this one has \S*second\S*B\S* \(14, 4\)"):
        load_checkpoint(folder, model, torch.optim.AdamW(trainable(model)[::-1]))
    optimizer = adamw(model)
    with pytest.raises(UserError, match="was saved without a scheduler"):
        load_checkpoint(folder, model, optimizer, CosineAnnealingLR(optimizer, 3))
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        load_checkpoint(tmp_path / "absent", model, adamw(model))
    with pytest.raises(UserError, match="are of PEFT models"):
        save_checkpoint(folder, Toy(), torch.optim.AdamW(Toy().parameters()), step=1)
    assert [raw(p) for p in trainable(model)] == before


def test_a_checkpoint_is_an_adapter_and_holds_no_pickle(three: Any) -> None:
    folder, model, _ = three
    again = PeftModel.from_pretrained(Toy(), folder / "checkpoint-3")
    assert torch.equal(again(inputs()), model(inputs()))
    files = {path.name for path in (folder / "checkpoint-3").iterdir()}
    assert {path.suffix for path in (folder / "checkpoint-3").iterdir()} == {".safetensors", ".json", ".md", ""}
    marker = json.loads((folder / "checkpoint-3" / "COMPLETE").read_text())
    assert marker["step"] == 3
    assert set(marker["files"]) == files - {"COMPLETE"}
