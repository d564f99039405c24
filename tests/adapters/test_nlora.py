"""NLoRA, SLoRA and IntTune beyond the golden trajectories: what the starts are, and what each variant can learn."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from toys import TARGETS, Toy, inputs, trainable, view

from loratlas import NLoraConfig, UserError


def config(**options: object) -> NLoraConfig:
    return NLoraConfig(**{"r": 4, "target_modules": list(TARGETS), **options})


def test_the_default_start_is_slices_and_changes_the_function_by_s_b_n_a() -> None:
    base, x = Toy(), inputs()
    model = get_peft_model(Toy(), config(lora_alpha=2))
    t, w = view(model), base.first.weight
    assert t.scaling == 0.5
    assert torch.equal(t.A, w[:4])
    assert torch.equal(t.N, w[:4, :4])
    assert torch.equal(t.B, w[:, :4])
    delta = 0.5 * w[:, :4] @ w[:4, :4] @ w[:4]
    torch.testing.assert_close(t.layer.get_delta_weight("default"), delta)
    torch.testing.assert_close(t.layer(x), nn.functional.linear(x, w + delta, base.first.bias))
    assert t.A0 is None


def test_the_nystrom_start_takes_out_what_it_puts_in() -> None:
    model = get_peft_model(Toy(dtype=torch.float64), config(init_weights="pinv"))
    t, w = view(model), Toy(dtype=torch.float64).first.weight
    product = t.B @ t.N @ t.A
    torch.testing.assert_close(product[:4], w[:4])
    torch.testing.assert_close(product[:, :4], w[:, :4])
    assert not t.layer.get_delta_weight("default").any()


def test_slora_starts_as_lora() -> None:
    t = view(get_peft_model(Toy(), config(init_weights="slora")))
    assert 0.5 * 12**-0.5 < t.A.abs().max() <= 12**-0.5
    assert 0.25 < t.N.abs().max() <= 0.5
    assert not t.B.any()


@pytest.mark.parametrize(("options", "count"), [({}, 4 * 28 + 16), ({"train": "core"}, 16)], ids=["nlora", "inttune"])
def test_parameters_a_layer(options: dict[str, str], count: int) -> None:
    model = get_peft_model(Toy(), config(target_modules=["first"], **options))
    assert sum(p.numel() for p in trainable(model)) == count


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"init_weights": "slora"}, 1e-3),
        ({}, 1e-3),
        ({"residual": True}, 0.5),  # the start's own rank is taken out and has to be put back as well
        ({"init_weights": "pinv"}, 0.5),
        ({"train": "core"}, 0.95),
    ],
    ids=["slora", "nlora", "residual", "nystrom", "inttune"],
)
def test_it_learns_a_rank_two_shift_as_far_as_its_factors_reach(options: dict[str, object], reached: float) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 16, bias=False)), torch.randn(64, 16)
    nn.init.normal_(base[0].weight, std=0.25)
    shift = torch.randn(16, 2) @ torch.randn(2, 16) / 8
    target = x @ (base[0].weight.detach() + shift).T
    model = get_peft_model(base, config(target_modules=["0"], **options))
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3, weight_decay=0.0)
    first = (x @ shift.T).square().mean()
    for _ in range(400):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < reached * first


def test_slices_that_can_never_train_are_refused_with_the_module_s_name() -> None:
    model = Toy()
    model.second.weight.data[:4] = 0.0
    with pytest.raises(UserError, match=r"module second: the first 4 rows or columns .* are all zero.*'slora'"):
        get_peft_model(model, config())


def test_bad_options() -> None:
    with pytest.raises(UserError, match="init_weights must be True, False, 'pinv' or 'slora'"):
        config(init_weights="nystrom")
    with pytest.raises(UserError, match="train must be 'all' or 'core', but it is 'N'"):
        config(train="N")
    with pytest.raises(UserError, match="whose B is zero"):
        config(train="core", init_weights="slora")
