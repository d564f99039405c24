"""TriAdaptLoRA: the triangular core by blocks, its starts, its scores and its schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from toys import TARGETS, Toy, goal, inputs, train, trainable, view, views

from loratlas import TriAdaptLoraConfig, UserError
from loratlas.adapters.triadaptlora import VARIANTS, core
from loratlas.engine.growing import Plan

STEPS = 12


def config(**options: Any) -> TriAdaptLoraConfig:
    known = {"r": 4, "target_modules": list(TARGETS), "incre_rank_num": 2, "init_warmup": 1, "incre_interval": 2}
    return TriAdaptLoraConfig(**{**known, **options})


def made(**options: Any) -> PeftModel:
    return get_peft_model(Toy(), config(**options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_core_is_the_sum_of_its_blocks(variant: str) -> None:
    model = made(init_variant=variant, init_r=2, r=5)
    train(model, inputs(), STEPS)
    for t in views(model):
        rank = int(t.rank)
        assert rank > 2
        blocks = t.block[:rank].tolist()
        assert blocks == (list(range(rank)) if variant == "single" else sorted(blocks))
        wanted = torch.zeros(len(t.born), len(t.born))
        for block in range(blocks[-1] + 1):
            own = [i for i, of in enumerate(blocks) if of == block]
            end = own[-1] + 1
            wanted[own, :end] += t.L[own, :end].detach()
            wanted[:end, own] += t.U[:end, own].detach()
        assert torch.equal(core(t, t.L, t.U).detach(), wanted)
        size = t.layer.method.size(t)
        torch.testing.assert_close(size, wanted.norm() / (blocks[-1] + 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_starts_at_the_base_and_trains(variant: str) -> None:
    model, x = made(init_variant=variant, init_r=2), inputs()
    y = model(x)
    assert torch.equal(y, Toy()(x))
    (y - goal(y)).square().mean().backward()
    for t in views(model):
        moving = {name for name in ("A", "B", "L", "U") if getattr(t, name).grad.any()}
        # nothing moves for ever where two factors are zero at once
        assert moving == ({"L", "U"} if variant == "c0" else {"B"})
    before = {name: getattr(view(model), name).detach().clone() for name in ("A", "B", "L", "U")}
    train(model, x, 4, total=STEPS)
    assert all(not torch.equal(getattr(view(model), name), value) for name, value in before.items())


def test_growth_with_a_zero_core_only_rescales() -> None:
    model = made(init_variant="c0")
    with torch.no_grad():
        for t in views(model):
            t.L[0, 0] = 0.5
    before = [t.layer.method.delta_weight(t).detach() for t in views(model)]
    train(model, inputs(), STEPS, optimizer=torch.optim.SGD(trainable(model), lr=0.0))
    for t, old in zip(views(model), before, strict=True):
        assert int(t.rank) > 1
        now = t.layer.method.delta_weight(t).detach()
        torch.testing.assert_close(now, old * (1 + 1e-5) / (int(t.rank) + 1e-5))


def test_how_many_modules_grow() -> None:
    method, plan = view(made()).layer.method, Plan(10, 5, 6, 100)
    linear, exponential = config(total_step=110), config(rank_growth="exponential")
    assert [method.chosen(linear, plan, g, 20, 0) for g in (10, 15, 20, 30, 60)] == [1, 1, 2, 4, 6]
    assert [method.chosen(exponential, plan, g, 20, 110) for g in (10, 30, 60, 110)] == [
        min(6, int(math.exp(p * math.log(20)))) for p in (0, 0.2, 0.5, 1)
    ]
    assert method.chosen(linear, plan, 200, 3, 0) == 5  # past its end p goes on; the budget holds


def test_the_size_is_measured_anew_whether_a_module_grows_or_not() -> None:
    model, sizes = made(target_total_rank=4, incre_rank_num=1), []
    train(model, inputs(), 3, total=STEPS, each=lambda step: sizes.append([float(t.norm) for t in views(model)]))
    assert sizes[0] == sizes[1]
    assert sorted(int(t.rank) for t in views(model)) == [1, 2]
    assert all(before != after for before, after in zip(sizes[1], sizes[2], strict=True))


def test_bad_options() -> None:
    with pytest.raises(UserError, match="rank_growth must be 'linear' or 'exponential'"):
        config(rank_growth="cubic")
    with pytest.raises(UserError, match="init_variant must be one of single, c0, eye"):
        config(init_variant="cb0")
