"""IncreLoRA: scores, reserves, the scaling of growth, and ranks where the target needs them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, adamw, goal, inputs, train, trainable, view, views

from loratlas import IncreLoraConfig, attach

STEPS = 12


def config(**options: Any) -> IncreLoraConfig:
    known = {"r": 4, "target_modules": list(TARGETS), "incre_rank_num": 2, "init_warmup": 1, "incre_interval": 2}
    return IncreLoraConfig(**{**known, "top_h": 1, **options})


def made(**options: Any) -> PeftModel:
    return get_peft_model(Toy(), config(**options))


def test_a_round_gives_the_modules_with_the_best_scores_their_ranks() -> None:
    model, seen = made(target_total_rank=8), []

    def note(step: int) -> None:
        seen.append([(int(t.rank), float(t.average * t.uncertainty)) for t in views(model)])

    train(model, inputs(), STEPS, each=note)
    gains = []
    for before, after in itertools.pairwise(seen):
        gained = [b[0] - a[0] for a, b in zip(before, after, strict=True)]
        if any(gained):
            gains.append(sum(gained))
            best = max((0, 1), key=lambda i: after[i][1])
            assert gained[best] == 2
    assert gains == [2, 2, 2]


def test_the_score_is_that_of_the_whole_matrices_summed_over_micro_batches() -> None:
    model = get_peft_model(Toy(dtype=torch.float64), config(lora_alpha=3.0))
    attach(model, adamw(model), total_steps=STEPS)
    t, batches = view(model, "second"), [inputs(dtype=torch.float64, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        t.E[:1] = 0.7
    wanted = 0.0
    for x in batches:
        hidden = torch.tanh(model.base_model.model.first(x)).detach()
        y = model.base_model.model.second(hidden)
        (gradient,) = torch.autograd.grad((y - goal(y)).square().mean(), y, retain_graph=True)
        delta = t.layer.method.delta_weight(t).detach()
        wanted += float((delta * (gradient.T @ hidden)).abs().sum()) / (14 * 16) ** 0.5
        y = model(x)
        (y - goal(y)).square().mean().backward()
    assert float(t.seen) == pytest.approx(wanted)
    y = model(batches[0])
    (y.sum() * float("inf")).backward()  # what a GradScaler would skip
    assert float(t.seen) == pytest.approx(wanted)


def test_scores_are_gathered_only_while_they_are_needed() -> None:
    model, seen = made(score_window=1), {}
    attach(model, optimizer := adamw(model), total_steps=STEPS)
    seen[1] = view(model).seen is not None
    train(
        model,
        inputs(),
        STEPS,
        optimizer=optimizer,
        each=lambda step: seen.update({step + 1: view(model).seen is not None}),
    )
    # rounds are at g = 2, 4, 6, that is in the steps 3, 5, 7; then the budget is used up
    assert [step for step, gathers in seen.items() if gathers] == [3, 5, 7]
    always = made()
    train(always, inputs(), 6, total=STEPS, each=lambda step: seen.update({step: view(always).seen is not None}))
    assert all(seen[step] for step in range(1, 7))


def test_growth_rescales_what_was_there() -> None:
    model = made(advance_learn=False, restart_warmup=False, orth_reg_weight=0.0)
    x = inputs()
    with torch.no_grad():
        for t in views(model):
            t.E[:1] = 1.0
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    before = [t.layer.method.delta_weight(t).detach() for t in views(model)]
    train(model, x, 4, total=STEPS, optimizer=optimizer)
    for t, old in zip(views(model), before, strict=True):
        now = t.layer.method.delta_weight(t).detach()
        torch.testing.assert_close(now, old * (1 + 1e-5) / (int(t.rank) + 1e-5))
    assert sorted(int(t.rank) for t in views(model)) == [1, 3]


def test_only_adam_moves_the_reserve_and_the_end_switches_it_off() -> None:
    moved = {}
    for name, make in {"adam": adamw, "sgd": lambda m: torch.optim.SGD(trainable(m), lr=1e-2)}.items():
        model = made(orth_reg_weight=0.0, slot_warmup=0)
        t, drawn = view(model), []
        optimizer = make(model)

        def note(step: int, drawn: list[Tensor] = drawn, t: Any = t) -> None:
            if step == 1:
                drawn.append(t.A[1:3].detach().clone())

        train(model, inputs(), 3, total=STEPS, optimizer=optimizer, each=note)
        assert float(t.reserve) == pytest.approx(1e-5)
        moved[name] = float((t.A[1:3].detach() - drawn[0]).abs().max())
    assert moved["sgd"] < 1e-6
    assert moved["adam"] > 5e-3
    train(model := made(), inputs(), STEPS)
    for t in views(model):
        assert float(t.reserve) == 0.0
        assert not t.A[int(t.rank) :].any()
        assert not t.B[:, int(t.rank) :].any()


def test_a_run_that_ends_before_its_budget_leaves_no_reserve() -> None:
    model = made(r=8, top_h=2, init_warmup=None, incre_interval=None)
    with pytest.warns(UserWarning, match="train longer"):
        train(model, inputs(), 3)
    assert sum(int(t.rank) for t in views(model)) < 16
    assert [t.layer.method.exported_rank(t) for t in views(model)] == [int(t.rank) for t in views(model)]


def test_the_official_rule_may_pass_the_budget() -> None:
    for rule, total in (("exact", 5), ("official", 6)):
        model = made(target_total_rank=5, incre_rank_num=2, allocation=rule, top_h=2)
        train(model, inputs(), STEPS)
        assert sum(int(t.rank) for t in views(model)) == total


class Parallel(nn.Module):
    """Layers beside one another, all on the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


@pytest.mark.parametrize("needy", range(4))
def test_ranks_go_where_the_target_needs_them(needy: int) -> None:
    base = Parallel()
    target = Parallel()
    with torch.no_grad():
        for i, layer in enumerate(target.layers):
            rank = 6 if i == needy else 1
            layer.weight += torch.randn(12, rank) @ torch.randn(rank, 12) / 12**0.5
    model = get_peft_model(base, IncreLoraConfig(r=3, r_max=9, top_h=1, target_modules="all-linear"))
    optimizer = adamw(model, 2e-2)
    attach(model, optimizer, total_steps=200)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        x = torch.randn(32, 12, generator=generator)
        (model(x) - target(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [int(t.rank) for t in views(model)]
    assert sum(found) == 12
    assert found[needy] >= 6
    assert found[needy] >= 2 + max(rank for i, rank in enumerate(found) if i != needy)


def test_a_whole_model_checkpoint_loads(tmp_path: Path) -> None:
    model, other = made(), made()
    train(model, inputs(), 7, total=STEPS)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(inputs()), model(inputs()))
