"""Fira: GaLore's step inside the subspace, the scaled residual outside, and a limiter on its norm."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steps import TALL, WIDE, normal, regression, run, state_bytes, weights
from torch import nn

from loratlas import UserError
from loratlas.optim.fira import FiraAdamW, FiraConfig, FiraRMSProp
from loratlas.optim.galore import GaLoreAdamW


@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_inside_galores_step_outside_the_scaled_gradient(shape: tuple[int, int], scaling: str) -> None:
    ours, theirs = weights(shape, dtype=torch.float64), weights(shape, dtype=torch.float64)
    fira = FiraAdamW([{"params": ours, "rank": 2}], lr=1.0, scaling=scaling)
    galore = GaLoreAdamW([{"params": theirs, "rank": 2}], lr=1.0)
    before = ours[0].detach().clone()
    run(fira, ours, 1)
    run(galore, theirs, 1)
    state, grad = fira.state[ours[0]], ours[0].grad
    step, galores = before - ours[0].detach(), before - theirs[0].detach()
    size = (1 - 0.999) ** 0.5 / (1 - 0.9)
    dim = 0 if "left" in state else 1
    basis = state["left" if dim == 0 else "right"]
    inside = basis.T @ basis @ grad if dim == 0 else grad @ basis.T @ basis
    over = dim if scaling == "column" else (0, 1)
    phi = galores.norm(dim=over, keepdim=True) / size / inside.norm(dim=over, keepdim=True)
    torch.testing.assert_close(step - galores, size * (grad - inside) * phi, rtol=1e-6, atol=1e-8)


def test_the_residual_makes_a_step_full_rank() -> None:
    (p,) = weights((10, 8), dtype=torch.float64)
    before = p.detach().clone()
    run(FiraAdamW([{"params": [p], "rank": 1}]), [p], 1)
    assert torch.linalg.matrix_rank(p - before, rtol=1e-9) == 8


def test_at_full_rank_nothing_is_left_over() -> None:
    ours, theirs = weights(TALL), weights(TALL)
    run(FiraAdamW([{"params": ours, "rank": 6}], lr=0.01), ours, 4)
    run(GaLoreAdamW([{"params": theirs, "rank": 6}], lr=0.01), theirs, 4)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_alpha(mode: str) -> None:
    """The paper's step is alpha times the one with alpha 1; the official code lets part of R P into the residual."""
    moved = {}
    for alpha in (1.0, 0.25):
        (p,) = weights(TALL, dtype=torch.float64)
        before = p.detach().clone()
        run(FiraAdamW([{"params": [p], "rank": 2, "alpha": alpha}], residual_mode=mode), [p], 1)
        moved[alpha] = p.detach() - before
    assert torch.allclose(moved[0.25], 0.25 * moved[1.0], rtol=1e-9) == (mode == "paper")


def growing_outside(shape: tuple[int, ...], step: int) -> torch.Tensor:
    """A gradient whose leading two directions stay while the rest grows."""
    leading = normal(shape[0], 2, seed=1) @ normal(2, shape[1], seed=2)
    return leading + 1e-3 * 1.5**step * normal(*shape, seed=3)


@pytest.mark.parametrize("cls", [FiraAdamW, FiraRMSProp])
def test_the_residual_grows_by_gamma_at_most(cls: type[FiraAdamW] | type[FiraRMSProp]) -> None:
    parameters = weights(TALL, WIDE)
    optimizer = cls([{"params": parameters, "rank": 2, "update_proj_gap": 3}], gamma=1.01)
    norms: list[torch.Tensor] = []
    for step in range(12):
        for p in parameters:
            p.grad = growing_outside(p.shape, step)
        optimizer.step()
        norms.append(torch.stack([optimizer.state[p]["residual_norm"].clone() for p in parameters]))
    for before, after in itertools.pairwise(norms):
        assert (after <= 1.01 * before * (1 + 1e-6)).all()
    torch.testing.assert_close(norms[-1], 1.01**11 * norms[0])


def test_a_gradient_of_zero_does_not_switch_the_residual_off() -> None:
    parameters = weights(TALL)
    optimizer = FiraAdamW([{"params": parameters, "rank": 2}])
    run(optimizer, parameters, 2)
    parameters[0].grad = torch.zeros(TALL)
    optimizer.step()
    assert float(optimizer.state[parameters[0]]["residual_norm"]) == 0
    run(optimizer, parameters, 1, first=3)
    assert float(optimizer.state[parameters[0]]["residual_norm"]) > 0.1


def test_no_limit() -> None:
    parameters = weights(TALL)
    optimizer = FiraAdamW([{"params": parameters, "rank": 2}], gamma=float("inf"))
    norms = []
    for step in range(3):
        parameters[0].grad = growing_outside(TALL, step)
        optimizer.step()
        norms.append(float(optimizer.state[parameters[0]]["residual_norm"]))
    assert norms[2] > 1.3 * norms[1] > 1.69 * norms[0]


def test_state_is_galores_and_one_number() -> None:
    ours, theirs = weights(WIDE), weights(WIDE)
    fira, galore = FiraAdamW([{"params": ours, "rank": 2}]), GaLoreAdamW([{"params": theirs, "rank": 2}])
    run(fira, ours, 1)
    run(galore, theirs, 1)
    assert state_bytes(fira) == state_bytes(galore)
    assert fira.state[ours[0]]["residual_norm"].dim() == 0


def test_far_below_galore_at_rank_one() -> None:
    def loss(cls: type[FiraAdamW] | type[GaLoreAdamW]) -> float:
        return regression(lambda p: cls([{"params": [p], "rank": 1, "update_proj_gap": 50}], lr=0.01), 400)

    assert loss(FiraAdamW) < 0.3 * loss(GaLoreAdamW)


def test_lora_factors_can_be_trained_by_it() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]))
    optimizer = FiraConfig(r=2, target_modules=["0"]).build(model, lr=0.05)
    names = optimizer.param_groups[0]["param_names"]
    assert [name.split(".")[-3] for name in names] == ["lora_A", "lora_B"]
    losses = []
    for _ in range(30):
        loss = (model(normal(8, 12)) - normal(8, 4, seed=3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"residual_mode": "code"}, "residual_mode"),
        ({"scaling": "row"}, "scaling"),
        ({"gamma": 0.9}, "gamma"),
        ({"proj_type": "full"}, "proj_type"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], field: str) -> None:
    for make in (lambda: FiraAdamW([{"params": weights(TALL), "rank": 2}], **options), lambda: FiraConfig(**options)):
        with pytest.raises(UserError) as error:
            make()
        assert error.value.field == field
