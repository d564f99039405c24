"""LoRA+: who has which rate, that it is PEFT's on PEFT's LoRA, and that schedules and resumes keep the rates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from toys import KINDS, TARGETS, Toy, adapted, goal, inputs, trainable

sys.path.append(str(Path(__file__).parent.parent / "train"))

import small

from loratlas import LoraPlusConfig, UserError, load_checkpoint, lora_plus, save_checkpoint
from loratlas.engine.pair_registry import low_rank_pairs
from loratlas.train.data import load_task
from loratlas.train.run import RunSpec, run
from loratlas.train.tables import read_tables


def pefts(kind: str = "linear", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    turned = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    return get_peft_model(Toy(kind), LoraConfig(**{"r": 4, "target_modules": list(TARGETS), **turned, **options}))


def made(who: str, kind: str = "linear") -> nn.Module:
    return pefts(kind) if who == "peft" else adapted(who, kind)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    y = model(x)
    (y - goal(y)).square().mean().backward()
    optimizer.step()


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]


def factors(model: nn.Module) -> list[tuple[Tensor, Tensor, str]]:
    """(the factor that ratio is for, the other, kind) of every pair."""
    pairs = low_rank_pairs(model, "the test")
    return [(p.a, p.b, p.kind) if p.kind == "embedding" else (p.b, p.a, p.kind) for p in pairs]


# ------------------------------------------------------------------------------------------------------- the rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["peft", "lora", "pissa", "srlora"])
def test_one_factor_has_the_ratio_and_in_the_first_step_moves_that_much_farther(who: str, kind: str) -> None:
    model = made(who, kind)
    optimizer = lora_plus(model, 1e-3, ratio=4)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3]
    assert set(rates(optimizer)) == {id(p) for p in trainable(model)}
    before = [(fast.detach().clone(), slow.detach().clone()) for fast, slow, _ in factors(model)]
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for (fast, slow, _), (old_fast, old_slow) in zip(factors(model), before, strict=True):
        torch.testing.assert_close(old_fast - fast, torch.full_like(fast, 4e-3), rtol=0, atol=1e-6)
        torch.testing.assert_close(old_slow - slow, torch.full_like(slow, 1e-3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["peft", "lora"])
def test_the_ratio_is_for_the_factor_that_starts_at_zero(who: str, kind: str) -> None:
    model = made(who, kind)
    optimizer = lora_plus(model, 1e-3)
    start = [slow.detach().clone() for _, slow, _ in factors(model)]
    assert [found for *_, found in factors(model)][1] != "embedding"
    assert all(not fast.any() and slow.any() for fast, slow, _ in factors(model))
    step(model, optimizer, inputs(kind))
    for (fast, slow, _), old in zip(factors(model), start, strict=True):
        moved = fast.detach().abs()
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 16e-3), rtol=0.01, atol=0)
        assert moved.any()
        assert torch.equal(slow, old)  # while the other is zero it has no gradient


def test_heads_and_vectors_have_the_plain_rate_and_vectors_no_decay() -> None:
    class Headed(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(14), nn.Linear(14, 3)

    model = get_peft_model(Headed(), LoraConfig(target_modules=list(TARGETS), modules_to_save=["norm", "head"]))
    groups = lora_plus(model, 1e-3, weight_decay=0.1).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (16e-3, 0.1), (1e-3, 0.0)]
    slow, fast, vectors = (set(group["param_names"]) for group in groups)
    assert len(slow) == 3
    assert len(fast) == 2
    assert len(vectors) == 3
    assert all("lora_A" in name or "head" in name for name in slow)
    assert all("lora_B" in name for name in fast)
    assert all("norm" in name or name.endswith("bias") for name in vectors)


# -------------------------------------------------------------------------------------------------------- as PEFT's


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_it_is_pefts_on_pefts_lora(kind: str, decay: float) -> None:
    head = {"target_modules": ["first"], "modules_to_save": ["second"]} if kind == "linear" else {}
    ours, theirs = (pefts(kind, **head) for _ in range(2))
    one = lora_plus(ours, 2e-3, weight_decay=decay, ratio=8)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8, loraplus_weight_decay=decay
    )
    x = inputs(kind)
    for _ in range(6):
        step(ours, one, x)
        step(theirs, other, x)
    assert any(fast.abs().max() > 0.02 for fast, *_ in factors(ours))
    for mine, p in zip(trainable(ours), trainable(theirs), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-6, atol=1e-7)


def test_ratio_one_is_adamw() -> None:
    ours, theirs = (pefts() for _ in range(2))
    one = lora_plus(ours, 2e-3, weight_decay=0.1, ratio=1, beta1=0.8, beta2=0.99, eps=1e-6)
    other = torch.optim.AdamW(trainable(theirs), 2e-3, (0.8, 0.99), 1e-6, 0.1)
    for _ in range(4):
        step(ours, one, inputs())
        step(theirs, other, inputs())
    for mine, p in zip(trainable(ours), trainable(theirs), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ schedules, resume


def test_schedules_scale_every_rate_alike() -> None:
    model = adapted("lora")
    optimizer = lora_plus(model, 1e-2, ratio=8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / 4)
    for done in range(4):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [1e-2 * (1 - done / 4), 8e-2 * (1 - done / 4)]
        )
        step(model, optimizer, inputs())
        schedule.step()


@pytest.mark.parametrize("who", ["peft", "lora", "pissa"])
def test_it_resumes_to_the_bit(who: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = made(who)
        optimizer = LoraPlusConfig(ratio=4).build(model, 1e-2, weight_decay=0.1)
        return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)

    def advance(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        for _ in range(3):
            step(model, optimizer, inputs())
            schedule.step()

    whole = build()
    advance(*whole)
    advance(*whole)
    first, second = build(), build()
    advance(*first)
    folder = save_checkpoint(tmp_path, first[0], first[1], step=3)
    load_checkpoint(folder, second[0], second[1])
    second[2].load_state_dict(first[2].state_dict())
    advance(*second)
    assert ratios(second[1]) == pytest.approx([1, 4])
    assert [g["lr"] for g in second[1].param_groups] == [g["lr"] for g in whole[1].param_groups]
    for resumed, straight in zip(trainable(second[0]), trainable(whole[0]), strict=True):
        assert torch.equal(resumed, straight)


# -------------------------------------------------------------------------------------------------- runs, bad input


@pytest.mark.parametrize("method", ["lora", "srlora-gradient"])
def test_a_run_trains_with_it(method: str, tmp_path: Path) -> None:
    bert = small.bert(tmp_path / "bert")
    task = load_task(read_tables(small.write_jsonl(tmp_path / "rows.jsonl", small.reviews(80))), bert, name="reviews")
    settings: dict[str, Any] = {"steps": 40, "batch_size": 8, "learning_rate": 2e-3, "options": {"r": 2}}
    result, plain, twice = (
        run(RunSpec(method, bert, str(tmp_path / str(i)), optimizer=optimizer, **settings), task).history
        for i, optimizer in enumerate(("lora-plus", None, "lora-plus"))
    )
    assert [row["loss"] for row in result] == [row["loss"] for row in twice]
    assert result[-1]["loss"] < plain[-1]["loss"]
    assert [row["learning_rate"] for row in result] == [row["learning_rate"] for row in plain]  # that of A


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"^LoRA\+ works on low-rank pairs s B A, and Toy has none that train"):
        lora_plus(Toy(), 1e-3)
    with pytest.raises(UserError, match="give it a LoRA adapter first"):
        LoraPlusConfig().check(Toy())
    for ratio in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="LoraPlusConfig: ratio must be positive and finite") as error:
            lora_plus(adapted("lora"), 1e-3, ratio=ratio)
        assert error.value.field == "ratio"
    for name, value in {"beta1": 1.0, "beta2": -0.1, "eps": -1.0}.items():
        with pytest.raises(UserError, match=f"LoraPlusConfig: {name} must be"):
            LoraPlusConfig(**{name: value})
