"""Every pair that trains is found, with the gradients that a pair has, and what is no pair is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from toys import KINDS, TARGETS, Toy, adapted, config, goal, inputs, trainable
from transformers.pytorch_utils import Conv1D

from loratlas import NLoraConfig, UserError
from loratlas.engine.pair_registry import LowRankPair, low_rank_pairs, other_parameters


def with_pefts(kind: str = "linear", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "init_lora_weights": False, **options}
    if kind == "conv1d":
        options["fan_in_fan_out"] = True
    return get_peft_model(Toy(kind), LoraConfig(**options))


def canonical(layer: nn.Module, stored: Tensor, pair: LowRankPair) -> Tensor:
    """(out, in), as the layer's kind has it."""
    turned = isinstance(layer, (nn.Embedding, Conv1D))
    return (stored.T if turned else stored).reshape(pair.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["peft", "lora", "pissa", "srlora", "srlora-inplace"])
def test_gradients_are_those_of_a_pair_in_the_whole_weight(who: str, kind: str) -> None:
    model = with_pefts(kind) if who == "peft" else adapted(who, kind, lora_alpha=6, init_weights=False)
    pairs = low_rank_pairs(model, "the test")
    assert [pair.path.split(".")[-1] for pair in pairs] == TARGETS
    assert {id(p) for p in trainable(model)} == {id(p) for pair in pairs for p in (pair.a, pair.b)}
    # a base's padding row has no gradient, while its adapter's up projection does
    x = inputs(kind).clamp_min(1) if kind == "embedding" else inputs(kind)
    (model(x) - goal(model(x))).square().mean().backward()

    merged: Any = copy.deepcopy(model).merge_and_unload()
    for pair, name in zip(pairs, TARGETS, strict=True):
        layer = getattr(merged, name)
        layer.weight.requires_grad_(True)
        (g,) = torch.autograd.grad((merged(x) - goal(merged(x))).square().mean(), layer.weight)
        g = canonical(layer, g, pair)
        grad_a, grad_b = pair.gradients()
        assert pair.scaling == 1.5
        torch.testing.assert_close(grad_a, pair.scaling * pair.up.T @ g, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(grad_b, pair.scaling * g @ pair.down.T, rtol=1e-3, atol=1e-6)
        down, up = pair.update()
        whole = canonical(layer, layer.weight.detach(), pair)
        torch.testing.assert_close(pair.weight() + up @ down, whole, rtol=1e-4, atol=1e-5)


def test_what_else_trains_and_the_scaling_as_it_is_now() -> None:
    model = with_pefts(target_modules=["first"], modules_to_save=["second"])
    (pair,) = low_rank_pairs(model, "the test")
    others = other_parameters(model, [pair])
    assert [p.shape for p in others] == [(14, 16)]
    assert pair.in_use()
    pair.layer.set_scale("default", 2.0)
    assert pair.scaling == 3.0
    with model.disable_adapter():
        assert not pair.in_use()
    pair.layer.merge()
    assert not pair.in_use()


def shared_factor() -> nn.Module:
    model = get_peft_model(nn.ModuleDict({n: nn.Linear(8, 8) for n in TARGETS}), LoraConfig(target_modules=TARGETS))
    first, second = (model.base_model.model._modules[n] for n in TARGETS)
    second.lora_A["default"].weight = first.lora_A["default"].weight
    return model


def second_adapter() -> nn.Module:
    model = adapted("lora")
    model.add_adapter("other", config("lora"))
    for name, p in model.named_parameters():
        p.requires_grad_("ATLAS_" in name)
    return model


def half() -> nn.Module:
    model = adapted("lora")
    low_rank_pairs(model, "the test")[1].a.requires_grad_(False)
    return model


REFUSED = {
    "has none that train": lambda: Toy(),
    "Toy|PeftModel has none": lambda: get_peft_model(Toy(), IA3Config(target_modules=TARGETS, feedforward_modules=[])),
    "of .*first is nlora": lambda: get_peft_model(Toy(), NLoraConfig(target_modules=TARGETS)),
    "of .*first is PEFT's DoraLinear": lambda: with_pefts(use_dora=True),
    "first and .*second, which share a factor": shared_factor,
    "first trains 'default' and 'other'": second_adapter,
    "second only one of them trains": half,
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_pair_is_refused(said: str) -> None:
    with pytest.raises(UserError, match=said):
        low_rank_pairs(REFUSED[said](), "the test")


def test_frozen_adapters_are_no_concern() -> None:
    model = adapted("lora")
    model.add_adapter("other", config("lora"))
    assert {pair.adapter for pair in low_rank_pairs(model, "the test")} == {"default"}
