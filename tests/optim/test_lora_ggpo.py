"""LoRA-GGPO, LoRA-MGPO and Flat-LoRA: what the perturbation is, when it acts, and that it leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import TARGETS, Toy, adamw, adapted, base_bytes, goal, inputs, trainable, views

from loratlas import UserError, attach, load_checkpoint, save_checkpoint
from loratlas.engine.pair_registry import LowRankPair, low_rank_pairs
from loratlas.optim.lora_ggpo import METHODS, LoraGgpoConfig, PerturbedAdamW
from loratlas.optim.perturbation import gradient_rows, noise, noise_std


def loss(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    return (y - goal(y)).square().mean()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss(model, inputs()).backward()
        optimizer.step()


def pefts() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Toy(), LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS)))


def perturbation(model: nn.Module, pair: LowRankPair) -> Tensor:
    """eps, (out, in): what the layer makes of the unit vectors, with it less without it."""
    eye = torch.eye(pair.shape[1])
    with torch.no_grad():
        plain = pair.layer(eye)
    return (pair.layer(eye) - plain).detach().T


# -------------------------------------------------------------------------------------------------- what eps is


@pytest.mark.parametrize("who", ["peft", "lora", "pissa", "srlora"])
def test_the_noise_of_a_row_has_the_variance_of_the_formula(who: str) -> None:
    model = pefts() if who == "peft" else adapted(who)
    pairs = low_rank_pairs(model, "the test")
    for pair in pairs:
        pair.up.normal_(generator=torch.Generator().manual_seed(1))
    loss(model, inputs()).backward()
    for pair, rows in zip(pairs, gradient_rows(pairs), strict=True):
        grad_a, grad_b = pair.gradients()
        g = pair.scaling * (grad_b @ pair.down + pair.up @ grad_a)
        down, up = pair.update()
        merged = pair.weight() + up @ down
        expected = 0.3 / pair.shape[1] ** 0.5 * (merged.square().sum(1) + 5.0 * g.square().sum(1)).sqrt()
        std = noise_std(pair, rows, sigma=0.3, beta=5.0)
        torch.testing.assert_close(std, expected, rtol=1e-4, atol=1e-6)
        drawn = noise(std, 100_000, key=7, dtype=torch.float32)
        torch.testing.assert_close(drawn.std(1), expected, rtol=0.02, atol=0)
        assert bool((drawn.mean(1).abs() < 5 * std / 100_000**0.5).all())


def test_layers_compute_with_the_perturbed_weight_and_differentiate_through_it() -> None:
    model = adapted("lora", init_weights=False)
    pair = low_rank_pairs(model, "the test")[0]
    optimizer = PerturbedAdamW(model, sigma=0.3)
    eps = noise(noise_std(pair, None, 0.3, 0.01), 12, key=0, dtype=torch.float32)
    x = inputs().requires_grad_(True)
    y = pair.layer(x)
    down, up = pair.update()
    weight = pair.weight() + up @ down + eps
    torch.testing.assert_close(y, x @ weight.T + pair.layer.base_layer.bias)
    (d_x,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(d_x, 2 * y.detach() @ weight)
    optimizer.remove()
    assert not torch.equal(pair.layer(x), y)


def test_noise_stays_within_a_step_and_changes_after_it() -> None:
    model = adapted("lora")
    pair, other = low_rank_pairs(model, "the test")
    optimizer = PerturbedAdamW(model, 0.0)
    first = perturbation(model, pair)
    assert torch.equal(perturbation(model, pair), first)  # the next micro-batch of the step
    assert not torch.equal(perturbation(model, other)[:12, :12], first[:12])
    steps(model, optimizer, 1)
    assert not torch.equal(perturbation(model, pair), first)


def test_flat_is_ggpo_without_gradient_and_sigma_zero_is_adamw() -> None:
    def run(**options: Any) -> list[Tensor]:
        model = adapted("pissa")
        steps(model, PerturbedAdamW(model, 1e-2, weight_decay=0.1, **options) if options else plain(model))
        return trainable(model)

    def plain(model: nn.Module) -> torch.optim.AdamW:
        return adamw(model, weight_decay=0.1)

    def equal(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    assert equal(run(method="flat"), run(beta=0.0))
    assert not equal(run(method="flat"), run(beta=50.0))
    assert not equal(run(method="flat"), run(method="flat", seed=1))
    for off in ({"sigma": 0.0}, {"method": "flat", "sigma": 0.0}, {"method": "mgpo", "rho": 0.0}):
        assert equal(run(**off), run())


@pytest.mark.parametrize("who", ["peft", "srlora"])
def test_mgpo_perturbs_along_the_momentum(who: str) -> None:
    model = pefts() if who == "peft" else adapted(who)
    pairs = low_rank_pairs(model, "the test")
    optimizer = PerturbedAdamW(model, 1e-2, method="mgpo", rho=0.5, max_scale=1.5)
    averages = [0.0, 0.0]
    for step in range(4):
        for i, pair in enumerate(pairs):
            eps = perturbation(model, pair)
            if step == 0:
                assert not eps.any()
                continue
            m_a, m_b = (optimizer.state[p]["exp_avg"] for p in (pair.a, pair.b))
            v = m_b @ pair.down + pair.up @ m_a
            expected = -0.5 * v / v.norm() * min(1 / averages[i], 1.5)
            torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()
        loss(model, inputs()).backward()
        for i, pair in enumerate(pairs):
            grad_a, grad_b = pair.gradients()
            size = float((pair.scaling * (grad_b @ pair.down + pair.up @ grad_a)).norm())
            averages[i] = 0.9 * averages[i] + 0.1 * size if step else size
        optimizer.step()


# -------------------------------------------------------------------------------------------------- when it acts


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_training_is_not_perturbed_and_the_base_is_not_written(method: str) -> None:
    model, x = adapted("lora", init_weights=False), inputs()
    before = base_bytes(model)
    optimizer = PerturbedAdamW(model, 1e-2, method=method, sigma=0.3)
    steps(model, optimizer)
    assert base_bytes(model) == before
    twin = adapted("lora", init_weights=False)
    twin.load_state_dict(model.state_dict())
    assert not torch.equal(model(x), twin(x))
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    assert torch.equal(copy.deepcopy(model)(x), twin(x))
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(x), twin(x))
    model.merge_adapter()
    twin.merge_adapter()
    assert torch.equal(model(x), twin(x))
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert torch.equal(model.eval()(x), twin.eval()(x))
    model.train()
    assert not torch.equal(model(x), twin(x))
    optimizer.remove()
    assert torch.equal(model(x), twin(x))


def test_a_forgotten_optimizer_perturbs_no_longer_and_a_second_one_is_refused() -> None:
    model, x = adapted("lora"), inputs()
    plain = model(x)
    first = PerturbedAdamW(model)
    with pytest.raises(UserError, match=r"another optimizer perturbs .*first already"):
        PerturbedAdamW(model)
    assert not torch.equal(model(x), plain)
    del first
    assert torch.equal(model(x), plain)
    PerturbedAdamW(model)


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_under_checkpointing_sees_the_same(method: str) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = adapted("lora", init_weights=False)
        optimizer = PerturbedAdamW(model, method=method, sigma=0.3)
        steps(model, optimizer, 2)
        optimizer.zero_grad()
        x = inputs()
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        (y - goal(y)).square().mean().backward()
        return [p.grad for p in trainable(model)]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = adapted("lora"), inputs().requires_grad_(True)
    optimizer = PerturbedAdamW(model)
    y = checkpoint(model, x, use_reentrant=True)
    with pytest.raises(UserError, match="use_reentrant"):
        y.sum().backward()
    optimizer.remove()


def test_mixed_precision_keeps_the_output_in_its_dtype() -> None:
    model, x = adapted("lora", dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    optimizer = PerturbedAdamW(model, sigma=0.3)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    optimizer.remove()
    assert not torch.equal(model(x), y)
    model, x = adapted("lora"), inputs()
    optimizer = PerturbedAdamW(model, sigma=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().sum().backward()
        optimizer.remove()
        assert not torch.equal(model(x), y)
        assert model(x).dtype == y.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------- resume, bad input


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(method: str, tmp_path: Path) -> None:
    def build() -> tuple[Any, PerturbedAdamW]:
        model = adapted("srlora")
        return model, PerturbedAdamW(model, 1e-2, method=method, sigma=0.3, beta=5.0)

    model, optimizer = build()
    attach(model, optimizer, total_steps=12)
    steps(model, optimizer, 7)
    optimizer.zero_grad()
    save_checkpoint(tmp_path, model, optimizer, step=7)
    steps(model, optimizer, 5)
    resumed, again = build()
    load_checkpoint(tmp_path, resumed, again)
    attach(resumed, again, total_steps=12)
    steps(resumed, again, 5)
    assert [int(t.events) for t in views(resumed)] == [4, 4]
    for ours, theirs in zip(trainable(model), trainable(resumed), strict=True):
        assert torch.equal(ours, theirs)
        assert all(torch.equal(value, again.state[theirs][name]) for name, value in optimizer.state[ours].items())


def test_bad_input_is_told() -> None:
    model = adapted("lora")
    saved = LoraGgpoConfig(method="mgpo").build(model, lr=1e-3).state_dict()
    with pytest.raises(UserError, match="saved with method='mgpo', and LoRA-GGPO is set up with method='ggpo'"):
        LoraGgpoConfig().build(model, lr=1e-3).load_state_dict(saved)
    with pytest.raises(UserError, match="saved with another optimizer"):
        LoraGgpoConfig().build(model, lr=1e-3).load_state_dict(adamw(model).state_dict())
    with pytest.raises(UserError, match="LoRA-GGPO works on low-rank pairs"):
        LoraGgpoConfig().check(Toy())
    with pytest.raises(UserError, match="perturbs linear layers"):
        LoraGgpoConfig().check(adapted("lora", "conv2d"))
    wrong = {"method": "sam", "sigma": -1.0, "beta": -1.0, "rho": -1.0, "ema_beta": 1.0, "max_scale": 0.0, "beta1": 1.0}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"LoraGgpoConfig: {name} must be"):
            LoraGgpoConfig(**{name: value})


def test_a_pair_without_gradients_keeps_what_was_measured_of_it() -> None:
    model = adapted("lora")
    optimizer = PerturbedAdamW(model, 1e-2, method="mgpo")
    steps(model, optimizer, 2)
    first, second = views(model)
    kept = optimizer.state[first.A]["grad_norm"].clone()
    optimizer.zero_grad()
    loss(model, inputs()).backward()
    first.A.grad = None
    before = optimizer.state[second.A]["grad_norm"].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[first.A]["grad_norm"], kept)
    assert not torch.equal(optimizer.state[second.A]["grad_norm"], before)
