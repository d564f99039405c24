"""LoRA-Pro: what it converges to, what its modes do, and that nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, adapted, goal, inputs, train, trainable, views

from loratlas import UserError, attach, load_checkpoint, save_checkpoint
from loratlas.engine.pair_registry import low_rank_pairs
from loratlas.linalg.tangent import tangent_factors
from loratlas.optim.lora_pro import MODES, LoraPro, LoraProConfig


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - goal(y)).square().mean()


def regression(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A PEFT LoRA on W, (20, 16), with s = 2, and a target W + a matrix of rank 4."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(16, 20, bias=False))
    target = base[0].weight.detach() + torch.randn(20, 4) @ torch.randn(4, 16) / 4
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"])), target


def error_after(steps: int, make: Any) -> float:
    """||W' - target||^2 / 2 after plain descent; its gradient in W' is W' - target, and full descent takes lr = 1."""
    model, target = regression()
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        error = 0.5 * (model(torch.eye(16)).T - target).square().sum()
        error.backward()
        optimizer.step()
    return float(error.detach())


def test_it_descends_as_full_fine_tuning_where_lora_cannot() -> None:
    ours = error_after(30, lambda model: LoraPro(model, 0.8, mode="sgd"))
    assert ours < 1e-9
    rates = (0.01, 0.03, 0.1, 0.8)
    plain = {lr: error_after(30, lambda model, lr=lr: torch.optim.SGD(trainable(model), lr)) for lr in rates}
    assert min(plain.values()) > 1e3 * ours
    assert not plain[0.8] < 1.0


def test_the_first_step_leaves_a_alone_and_moves_b_by_the_projected_gradient() -> None:
    for mode in ("sgd", "full"):
        model, target = regression()
        (pair,) = low_rank_pairs(model, "the test")
        before = pair.down.clone()
        optimizer = LoraPro(model, 1e-2, mode=mode)
        (model(torch.eye(16)).T - target).square().sum().backward()
        grad_b = pair.b.grad.clone()
        optimizer.step()
        assert torch.equal(pair.down, before)
        if mode == "sgd":
            expected = -1e-2 * grad_b @ torch.linalg.inv(before @ before.T) / 4
            torch.testing.assert_close(pair.up, expected, rtol=1e-4, atol=1e-7)
        assert torch.equal(pair.b.grad, grad_b)  # gradients stay as they are


@pytest.mark.parametrize("x_mode", ["sylvester", "zero"])
def test_efficient_is_adamw_on_the_adjusted_gradients_and_on_the_head(x_mode: str) -> None:
    def build() -> Any:
        torch.manual_seed(3)
        options = {"target_modules": ["first"], "modules_to_save": ["second"], "init_lora_weights": False}
        return get_peft_model(Toy(), LoraConfig(r=4, lora_alpha=6, **options))

    ours, theirs, x = build(), build(), inputs()
    optimizer = LoraPro(ours, 1e-2, weight_decay=0.1, x_mode=x_mode)
    (pair,) = low_rank_pairs(theirs, "the test")
    adamw = torch.optim.AdamW(trainable(theirs), 1e-2, weight_decay=0.1)
    for _ in range(4):
        for model in (ours, theirs):
            model.zero_grad()
            loss(model, x).backward()
        optimizer.step()
        stack = [t[None].double() for t in (pair.down, pair.up, *pair.gradients())]
        s = torch.tensor([1.5], dtype=torch.float64)
        moved = tangent_factors(*stack, s, x_mode=x_mode, jitter=1e-8)
        pair.a.grad, pair.b.grad = (move[0].float() for move in moved)
        adamw.step()
    for mine, other in zip(trainable(ours), trainable(theirs), strict=True):
        assert torch.equal(mine, other)


def test_full_mode_takes_the_adam_direction_of_the_weight() -> None:
    """Its move of W is the projection of Adam's direction for the projected gradient."""
    model, target = regression()
    (pair,) = low_rank_pairs(model, "the test")
    pair.up.normal_(generator=torch.Generator().manual_seed(1))
    optimizer = LoraPro(model, 1e-6, mode="full")
    momentum, square = torch.zeros(20, 16), torch.zeros(20, 16)
    for t in range(1, 5):
        optimizer.zero_grad()
        (model(torch.eye(16)).T - target).square().sum().backward()
        a, b = pair.down.clone(), pair.up.clone()
        optimizer.step()
        p_b, p_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
        g = 2 * ((pair.weight() + 2 * b @ a) - target)
        g = p_b @ g + g @ p_a - p_b @ g @ p_a
        momentum, square = 0.9 * momentum + 0.1 * g, 0.999 * square + 0.001 * g**2
        g = momentum / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        d_a, d_b = (a - pair.down) / 1e-6, (b - pair.up) / 1e-6
        torch.testing.assert_close(2 * (b @ d_a + d_b @ a), p_b @ g + g @ p_a - p_b @ g @ p_a, rtol=0.05, atol=0.3)
        torch.testing.assert_close(optimizer.state[pair.a]["exp_avg_sq"], square, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "embedding"])
def test_every_layer_kind_trains_with_pefts_lora_and_ours_alike(kind: str) -> None:
    x, factors = inputs(kind), {}
    turned = {"fan_in_fan_out": True} if kind == "conv1d" else {}
    pefts = get_peft_model(Toy(kind), LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), **turned))
    ours = adapted("lora", kind, lora_alpha=6)
    modes = ("efficient",) if kind == "embedding" else MODES
    for mode in modes:
        for who, model in (("peft", pefts), ("ours", ours)):
            pairs = low_rank_pairs(model, "the test")
            for i, pair in enumerate(pairs):
                pair.down.normal_(generator=torch.Generator().manual_seed(i))
                pair.up.normal_(generator=torch.Generator().manual_seed(i + 9)).mul_(0.1)
            optimizer = LoraPro(model, 1e-3, mode=mode)
            for _ in range(3):
                optimizer.zero_grad()
                loss(model, x).backward()
                optimizer.step()
            factors[who] = [(pair.down.clone(), pair.up.clone()) for pair in pairs]
        for ours_, theirs in zip(factors["ours"], factors["peft"], strict=True):
            torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- SRLoRA


@pytest.mark.parametrize("mode", MODES)
def test_recomposition_goes_on_under_it(mode: str) -> None:
    model, x = adapted("srlora"), inputs()
    optimizer = LoraPro(model, 1e-3, mode=mode)
    first = float(loss(model, x))
    train(model, x, 12, optimizer=optimizer)
    assert [int(t.events) for t in views(model)] == [4, 4]
    assert float(loss(model, x)) < first


def test_moments_of_slots_start_again_where_there_are_some() -> None:
    model, x = adapted("srlora", optimizer_reset="zero"), inputs()
    optimizer = LoraPro(model, 1e-3)
    t = views(model)[0]
    seen: list[bool] = []

    def look(step: int) -> None:
        fresh = (t.born == step).nonzero().flatten()
        seen.extend(not optimizer.state[t.A]["exp_avg"][slot].any() for slot in fresh)

    train(model, x, 12, optimizer=optimizer, each=look)
    assert seen == [True] * 8
    corrected = adapted("srlora", optimizer_reset="corrected")
    train(corrected, x, 12, optimizer=LoraPro(corrected, 1e-3))
    assert [int(t.events) for t in views(corrected)] == [4, 4]
    for mode in ("full", "sgd"):
        for reset in ("zero", "corrected", "mean_v"):
            other = adapted("srlora", optimizer_reset=reset)
            with pytest.raises(UserError, match="LoraPro keeps none as it is set up: choose 'keep'"):
                attach(other, LoraPro(other, mode=mode), total_steps=12)


# ------------------------------------------------------------------------------------------------ resume, bad input


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", ["float32", "bfloat16"])
def test_resume_is_exact(mode: str, momentum: str, tmp_path: Path) -> None:
    if momentum != "float32" and mode != "full":
        pytest.skip("only full mode has such a moment")
    x = inputs()

    def steps(model: Any, optimizer: LoraPro, start: int, end: int) -> None:
        attach(model, optimizer, total_steps=12)
        for step in range(start, end):
            if step == 7 and end == 12 and start == 0:
                save_checkpoint(tmp_path, model, optimizer, step=step)
            loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()

    def build() -> tuple[Any, LoraPro]:
        model = adapted("srlora")
        return model, LoraPro(model, 1e-3, mode=mode, momentum_dtype=momentum)

    model, optimizer = build()
    steps(model, optimizer, 0, 12)
    resumed, again = build()
    assert load_checkpoint(tmp_path, resumed, again).step == 7
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    steps(resumed, again, 7, 12)
    for ours, theirs in zip(trainable(model), trainable(resumed), strict=True):
        assert torch.equal(ours, theirs)
    for moments in (optimizer.state[p] for p in trainable(model)):
        assert all(value.dtype == torch.float32 for name, value in moments.items() if name != "exp_avg")
    assert mode == "sgd" or any("exp_avg" in optimizer.state[p] for p in trainable(model))


def test_a_loaded_momentum_keeps_its_dtype_without_our_checkpoints() -> None:
    model = adapted("lora")
    optimizer = LoraPro(model, mode="full", momentum_dtype="bfloat16")
    train(model, inputs(), 2, optimizer=optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[views(model)[0].A]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[views(model)[0].A]["exp_avg_sq"].dtype == torch.float32


def test_another_mode_is_not_resumed() -> None:
    model = adapted("lora")
    saved = LoraPro(model, mode="full").state_dict()
    with pytest.raises(UserError, match="saved with mode='full', and LoRA-Pro is set up with mode='efficient'"):
        LoraPro(model).load_state_dict(saved)
    with pytest.raises(UserError, match="another optimizer"):
        LoraPro(model).load_state_dict(torch.optim.AdamW(trainable(model)).state_dict())


def test_factors_that_are_not_finite_are_named() -> None:
    model = adapted("pissa")
    optimizer = LoraPro(model)
    loss(model, inputs()).backward()
    views(model)[1].B.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"factors of .*second hold NaN"):
        optimizer.step()


def test_what_cannot_work_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="LoRA-Pro works on low-rank pairs"):
        LoraProConfig().check(Toy())
    embedding = adapted("lora", "embedding")
    with pytest.raises(UserError, match=r"two 16 x 30 matrices for the embedding .*first"):
        LoraProConfig(mode="full").check(embedding)
    LoraProConfig().check(embedding)
    wrong = {"mode": "half", "x_mode": "none", "beta1": 1.0, "eps": -1.0, "jitter": -1.0, "momentum_dtype": "float16"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"LoraProConfig: {name} must be"):
            LoraProConfig(**{"mode": "full", name: value})
    with pytest.raises(UserError, match="keeps no such moment"):
        LoraProConfig(momentum_dtype="bfloat16")


def test_a_pair_without_gradients_or_scaling_stands_still() -> None:
    model = adapted("pissa")
    optimizer = LoraProConfig().build(model, lr=1e-2)
    loss(model, inputs()).backward()
    first, second = views(model)
    first.A.grad = None
    second.layer.set_scale("default", 0.0)
    before = [p.clone() for p in trainable(model)]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True))
