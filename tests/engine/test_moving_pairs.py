"""The pieces that methods with moving ranks are made of: gates, slots, budgets, a learning rate a slot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from loratlas.engine.budget import growth
from loratlas.engine.gates import threshold_
from loratlas.engine.importance import update_sensitivity
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.moments import age_correction, restarted_rates, slot_rates
from loratlas.engine.orthogonality import orthogonality


def test_thresholds() -> None:
    start = torch.tensor([0.5, -0.5, 0.2, -0.19, 0.11, 0.1, -0.1, 0.05, 0.0], dtype=torch.float64)
    prox, official = start.clone(), start.clone()
    threshold_([prox], 0.1, "prox")
    threshold_([official], 0.1, "official")
    torch.testing.assert_close(prox, nn.functional.softshrink(start, 0.1))
    # the three statements of the official code, one after another
    wanted = start.clone()
    wanted[wanted > 0.1] -= 0.1
    wanted[wanted < -0.1] += 0.1
    wanted[wanted.abs() < 0.1] = 0.0
    assert torch.equal(official, wanted)


def test_growth_stays_within_budget_and_capacity() -> None:
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0])
    ranks, capacity = [1, 1, 1, 1], [4, 4, 2, 4]
    assert growth(scores, ranks, capacity, add=2, chosen=2, budget=10, rule="exact") == [2, 0, 1, 0]
    assert growth(scores, ranks, capacity, add=2, chosen=3, budget=2, rule="exact") == [2, 0, 0, 0]
    assert growth(scores, [4, 1, 2, 1], capacity, add=1, chosen=2, budget=10, rule="exact") == [0, 1, 0, 1]
    assert growth(scores, [4, 4, 2, 4], capacity, add=1, chosen=2, budget=10, rule="exact") == [0, 0, 0, 0]
    assert growth(torch.ones(4), ranks, [9] * 4, add=2, chosen=1, budget=1, rule="official") == [2, 2, 2, 2]


@pytest.mark.parametrize("dim", [0, 1])
def test_slots_move_as_parameters_of_their_own_would(dim: int) -> None:
    """Slot 2 comes to life after 3 steps, at a quarter of the rate: as a tensor of its own in its own group, with an
    eps as large as its gradients."""
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    own = nn.Parameter(whole.detach().select(dim, 2).clone())
    options = {"betas": (0.9, 0.99), "eps": 0.5, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([whole], lr=0.1, **options)
    alone = torch.optim.AdamW([own], lr=0.025, **options)
    born = torch.zeros(3, dtype=torch.int64)
    for step in range(1, 9):
        g = torch.randn(3, 3, dtype=torch.float64)
        if step == 4:
            born[2] = 3
            whole.data.select(dim, 2).copy_(own)  # weight decay has moved what was not alive
        if step <= 3:
            g.select(dim, 2).zero_()
        whole.grad = g
        context = StepContext(optimizer, step, 8)
        rates = torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64)
        corrections = [age_correction(whole, dim, born, context), slot_rates([(whole, dim, rates)])]
        optimizer.step()
        for correct in corrections:
            correct()
        if step > 3:
            own.grad = g.select(dim, 2).clone()
            alone.step()
            torch.testing.assert_close(whole.detach().select(dim, 2), own.detach(), rtol=1e-9, atol=1e-12)


def test_orthogonality_is_the_mean_over_all_factors() -> None:
    torch.manual_seed(0)
    shapes = [(4, 6, 5), (4, 6, 5), (3, 7, 9)]
    downs, ups = [torch.randn(r, n) for r, n, _ in shapes], [torch.randn(m, r) for r, _, m in shapes]
    used = [torch.ones(4), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.ones(3)]
    total = 0.0
    for a, b, mask in zip(downs, ups, used, strict=True):
        k = int(mask.sum())
        total += (a[:k] @ a[:k].T - torch.eye(k)).norm() + (b[:, :k].T @ b[:, :k] - torch.eye(k)).norm()
    torch.testing.assert_close(orthogonality(downs, ups, used), total / 6)


def test_slots_without_their_moments_are_as_old_as_the_optimizer() -> None:
    """An adapter that goes on with a new optimizer moves as under that one."""
    p, twin = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizers = [torch.optim.AdamW([each], lr=0.1) for each in (p, twin)]
    for each in (p, twin):
        each.grad = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    correct = age_correction(p, 0, torch.tensor([0, 10]), StepContext(optimizers[0], 40, 50))
    for optimizer in optimizers:
        optimizer.step()
    correct()
    torch.testing.assert_close(p, twin)


@pytest.mark.parametrize("kind", ["linear", "constant", "cosine"])
def test_a_slot_warms_up_anew_and_then_falls_as_the_run_does(kind: str) -> None:
    total, warmup, birth = 20, 3, 6
    run = {
        "linear": lambda g: min(g / warmup, (total - g) / (total - warmup)),
        "constant": lambda g: 1.0,
        "cosine": lambda g: 0.5 * (1 + math.cos(math.pi * g / total)),
    }[kind]
    born, peak = torch.tensor([0, birth]), torch.zeros(2, dtype=torch.float64)
    found = []
    for step in range(birth + 1, total + 1):
        now = run(step - 1)
        first, second = (restarted_rates(step, born, peak, now, warmup) * now).tolist()
        assert first == pytest.approx(now)
        found.append(second)
    assert found[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert found[3:] == pytest.approx([run(g) / run(birth + warmup) for g in range(birth + warmup, total)])


def test_the_score_needs_no_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    g, x, down, up = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 7), (9, 5), (2, 5), (7, 2)))
    monkeypatch.setattr("loratlas.engine.importance.CHUNK", 10)  # two rows at a time, and one at the end
    whole = ((up @ down) * (g.T @ x)).abs().sum()
    torch.testing.assert_close(update_sensitivity(g, x, down, up), whole)
