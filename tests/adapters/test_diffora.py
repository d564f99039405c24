"""DiffoRA: the logits' gradient and turns, what is chosen, what becomes of the rest, the two halves of the data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, adamw, adapted, goal, inputs, train, trainable, view, views

from loratlas import DiffoRAConfig, UserError, attach
from loratlas.adapters.diffora import NONE, OWN, SHARED, DiffoRA, choose, pair_up
from loratlas.adapters.search_data import SearchSampler
from loratlas.engine.export import export_lora


class Deep(nn.Module):
    """Residual layers, numbered as those of a transformer."""

    def __init__(self, seed: int = 0, depth: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(depth))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return x


def config(**options: Any) -> DiffoRAConfig:
    defaults = {"r": 4, "scope": "global", "search_steps": 8, "warmup_steps": 2, "target_modules": "all-linear"}
    return DiffoRAConfig(**{**defaults, **options})


def deep(**options: Any) -> PeftModel:
    base = Deep(depth=4)
    torch.manual_seed(1)
    return get_peft_model(base, config(**options))


def roles(model: nn.Module) -> list[int]:
    return [int(t.role) for t in views(model)]


# -------------------------------------------------------------------------------------------------------------- search


def test_the_gradient_of_a_logit_is_the_difference_quotient() -> None:
    torch.manual_seed(1)
    model = get_peft_model(Toy(dtype=torch.float64), config(r=3, lora_alpha=2, arch_beta1=0.0, arch_weight_decay=0.0))
    x = inputs(dtype=torch.float64)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=20)

    def loss() -> Tensor:
        return (model(x) - goal(model(x))).square().mean()

    def moved(t: Any, by: float) -> float:
        t.factor.copy_(torch.sigmoid(t.logit + by))
        found = float(loss().detach())
        t.factor.copy_(torch.sigmoid(t.logit))
        return found

    for _ in range(2):  # warm-up, so that B is not zero
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    slopes = [(moved(t, 1e-5) - moved(t, -1e-5)) / 2e-5 for t in views(model)]
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    for t, slope in zip(views(model), slopes, strict=True):  # beta1 = 0: the mean is the gradient
        assert float(t.arch_mean) == pytest.approx(slope, rel=1e-6)
        assert float(t.logit) == pytest.approx(-1e-3 * (1 if slope > 0 else -1), rel=1e-3)


def test_weights_and_logits_move_in_turn() -> None:
    """Warm-up 1, 2; logits 3, 5, 7; weights 4, 6, 8. What rests is not moved by momentum or decay."""
    model = get_peft_model(Toy(), config(target_modules=["first"], modules_to_save=["second"]))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    before, moved = {}, []

    def look(step: int) -> None:
        now = {
            "logit": view(model).logit.clone(),
            **{str(i): p.detach().clone() for i, p in enumerate(trainable(model))},
        }
        moved.append({name for name in now if before and not torch.equal(now[name], before[name])})
        before.clear()
        before.update(now)

    look(0)
    train(model, inputs(), 8, total=20, optimizer=optimizer, each=look)
    weights = {"0", "1", "2"}
    assert moved[2:] == [weights, {"logit"}, weights, {"logit"}, weights, {"logit"}, weights]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(held) == 3


def test_the_search_finds_the_layers_that_need_change() -> None:
    """The target differs in layers 2 and 4 of six; another pair of layers of the same size fits it worse."""

    def fit(seed: int, **options: Any) -> tuple[list[int], float]:
        teacher, generator = Deep(seed).requires_grad_(False), torch.Generator().manual_seed(seed)
        for number in (2, 4):
            change = torch.randn(12, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
            teacher.layers[number].weight.add_(change / 4)
        torch.manual_seed(seed)
        model = get_peft_model(
            Deep(seed), config(**{"budget_modules": 2, "search_steps": 160, "warmup_steps": None, **options})
        )
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=300)
        for _ in range(300):
            x = torch.randn(64, 12, generator=generator)
            loss = (model(x) - teacher(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [number for number, role in enumerate(roles(model)) if role != NONE], float(loss.detach())

    for seed in (0, 1):
        chosen, loss = fit(seed, arch_lr=1e-2)
        assert chosen == [2, 4]
        blind, other = fit(seed, arch_lr=0.0)
        assert blind == [0, 1]  # equal logits: the first ones
        assert loss < 0.05 * other


# -------------------------------------------------------------------------------------------------------------- choice


def test_the_budget_is_met_exactly() -> None:
    paths = [f"encoder.layer.{layer}.{kind}" for layer in (0, 1, 11) for kind in ("q", "k", "v")] + ["pooler"]
    scores = torch.tensor([3.0, 1, 2, 0, 0, 0, 9, 8, 7, -1])

    def chosen(**options: Any) -> list[int]:
        return [i for i, role in enumerate(choose(scores, paths, config(**options))) if role == OWN]

    assert chosen(scope="layer", budget=0.5) == [0, 2, 3, 4, 6, 7, 9]  # ties go to the earlier ones
    assert chosen(scope="layer", budget=1 / 3) == [0, 3, 6, 9]
    assert chosen(scope="layer", budget_modules=1) == [0, 3, 6, 9]
    assert chosen(scope="global", budget=0.5) == [0, 2, 6, 7, 8]
    assert chosen(scope="global", budget=0.3) == [6, 7, 8]
    assert chosen(scope="global", budget_modules=4) == [0, 6, 7, 8]
    assert chosen(scope="global", budget=1.0) == list(range(10))
    assert pair_up([OWN, NONE, NONE, OWN, NONE], list("aabbb")) == [OWN, SHARED, SHARED + 1, OWN, SHARED + 1]


@pytest.mark.parametrize("after", ["finetune", "retrain"])
def test_what_is_not_chosen_is_gone(after: str, tmp_path: Path) -> None:
    model, x, optimizer = deep(after_search=after), inputs(), None
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    rested: list[Tensor] = []

    def look(step: int) -> None:
        if step == 8:
            rested.extend(p.detach().clone() for t in views(model) if int(t.role) == NONE for p in (t.A, t.B))
            assert (sum(float(t.B.detach().abs().sum()) for t in views(model) if int(t.role) == OWN) == 0) == (
                after == "retrain"
            )

    train(model, x, 14, optimizer=optimizer, each=look)
    assert sorted(roles(model)) == [OWN, OWN, NONE, NONE]
    dropped = [t for t in views(model) if int(t.role) == NONE]
    assert [float(t.factor) for t in dropped] == [0.0, 0.0]
    assert all(torch.equal(p, old) for p, old in zip((p for t in dropped for p in (t.A, t.B)), rested, strict=True))
    assert len(trainable(model)) == len(optimizer.state) == 4
    assert [t.rank_log.tolist() for t in dropped] == [[[0, 4], [8, 0]]] * 2
    report = export_lora(model, tmp_path)
    assert (report.exact_rank, report.relative_error) == (4, 0.0)
    stock = PeftModel.from_pretrained(Deep(depth=4), tmp_path)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-6)


def test_the_decision_leaves_the_chosen_updates_what_they_were() -> None:
    model = deep(budget=1.0)
    before: list[Tensor] = []
    train(
        model,
        inputs(),
        8,
        total=20,
        each=lambda step: (
            before.extend(t.layer.method.delta_weight(t).detach() for t in views(model)) if step == 7 else None
        ),
    )
    # step 8 moves the weights and decides: one more step of a run that decides later is the same
    later = deep(budget=1.0, search_steps=9)
    train(later, inputs(), 8, total=20)
    for ours, theirs, old in zip(views(model), views(later), before, strict=True):
        now = ours.layer.method.delta_weight(ours)
        torch.testing.assert_close(now, theirs.layer.method.delta_weight(theirs), rtol=1e-5, atol=1e-6)
        assert not torch.equal(now, old)
    assert roles(model) == [OWN] * 4
    assert [float(t.factor) for t in views(model)] == [1.0] * 4


def test_modules_of_one_kind_share_a_pair() -> None:
    """As one parameter that is used in three places."""
    model, x = deep(budget_modules=1, share_unselected="per_type"), inputs()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    train(model, x, 8, total=20, optimizer=optimizer)
    shared = [t for t in views(model) if int(t.role) == SHARED]
    own = next(t for t in views(model) if int(t.role) == OWN)
    assert len(shared) == 3
    one = {name: getattr(shared[0], name).detach().clone().requires_grad_() for name in ("A", "B")}
    kept = {name: getattr(own, name).detach().clone() for name in ("A", "B")}

    y = x
    for number, t in enumerate(views(model)):
        a, b = (kept["A"], kept["B"]) if t.layer is own.layer else (one["A"], one["B"])
        y = y + 0.5 * torch.tanh(y @ (Deep(depth=4).layers[number].weight.detach() + b @ a).T)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    (y - goal(y)).square().mean().backward()
    train(model, x, 1, total=20, optimizer=optimizer)
    for t in shared:
        for name, p in one.items():
            torch.testing.assert_close(getattr(t, name), p - 0.1 * p.grad, rtol=1e-4, atol=1e-6)
            assert torch.equal(getattr(t, name), getattr(shared[0], name))


def test_with_its_gates_at_one_it_is_lora() -> None:
    model, plain, x = (
        get_peft_model(Toy(), config(target_modules=list(TARGETS), lora_alpha=8)),
        adapted("lora"),
        inputs(),
    )
    for ours, theirs in zip(views(model), views(plain), strict=True):
        ours.factor.fill_(1.0)
        ours.role.fill_(OWN)
        ours.A.data.copy_(theirs.A)
        ours.B.data.copy_(theirs.B)
    train(model, x, 6, total=20)
    train(plain, x, 6, total=20)
    assert torch.equal(model(x), plain(x))


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("share", ["none", "per_type"])
@pytest.mark.parametrize("stop_at", [5, 10])
def test_resume_is_exact(stop_at: int, share: str, tmp_path: Path) -> None:
    x, steps = inputs(), 14
    whole = deep(share_unselected=share)
    train(whole, x, steps)

    first = deep(share_unselected=share)
    optimizer = adamw(first)
    train(first, x, stop_at, total=steps, optimizer=optimizer)
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second = PeftModel.from_pretrained(Deep(depth=4), tmp_path, is_trainable=True)
    optimizer = adamw(second)
    optimizer.load_state_dict(state)
    train(second, x, steps - stop_at, total=steps, optimizer=optimizer)
    for ours, theirs in zip(views(second), views(whole), strict=True):
        for name in (*DiffoRA.params, *DiffoRA.buffers):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_further_stage_searches_no_more(tmp_path: Path) -> None:
    model, x = deep(), inputs()
    train(model, x, 10)
    chosen = roles(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Deep(depth=4), tmp_path, is_trainable=True)
    optimizer = adamw(again)
    attach(again, optimizer, total_steps=3, restart=True)  # too short for a search
    train(again, x, 3, optimizer=optimizer)
    assert roles(again) == chosen


def test_the_run_must_hold_the_search() -> None:
    model = deep()
    with pytest.raises(UserError, match="total_steps=N"):
        attach(model, adamw(model))
    with pytest.raises(UserError, match="a search of 8 steps, 2 of them warm-up, does not fit into a run of 7"):
        attach(model, adamw(model), total_steps=7)


# ---------------------------------------------------------------------------------------------------------------- data


def test_the_two_kinds_of_steps_see_different_rows() -> None:
    sampler = SearchSampler(10, per_step=4, total_steps=30, config=config(), seed=3)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 120
    assert rows == list(sampler)
    steps = [set(rows[i : i + 4]) for i in range(0, 120, 4)]
    logits = set().union(*(steps[i] for i in (2, 4, 6)))
    weights = set().union(*(steps[i] for i in (0, 1, 3, 5, 7)))
    assert len(logits) == len(weights) == 5
    assert logits.isdisjoint(weights)
    assert set().union(*steps[8:]) == set(range(10))
    assert rows != list(SearchSampler(10, per_step=4, total_steps=30, config=config(), seed=4))
    with pytest.raises(UserError, match="leaves one empty"):
        SearchSampler(1, per_step=4, total_steps=30, config=config())


def test_steps_of_like_lengths_keep_the_halves_apart() -> None:
    lengths = [7 * row % 60 for row in range(60)]
    options = {"per_step": 4, "total_steps": 60, "config": config(), "seed": 3}
    plain, alike = (list(SearchSampler(60, **options, lengths=given)) for given in (None, lengths))
    assert alike == list(SearchSampler(60, **options, lengths=lengths))
    steps = [alike[i : i + 4] for i in range(0, 240, 4)]
    assert set(steps[2] + steps[4] + steps[6]) <= set(plain) - set(plain[:8])
    assert set(steps[2] + steps[4] + steps[6]).isdisjoint(steps[0] + steps[1] + steps[3] + steps[5] + steps[7])
    assert all(len(set(step)) == 4 for step in steps)
    assert all(sorted(steps[i]) != sorted(steps[j]) for i in range(8, 23) for j in range(i))  # one epoch
    spread = [max(found) - min(found) for found in ([lengths[row] for row in step] for step in steps[8:])]
    assert max(spread) <= 4  # 60 different lengths, sorted by fours
    few = SearchSampler(5, per_step=4, total_steps=9, config=config(), lengths=range(5))  # halves smaller than a step
    assert len(list(few)) == 36


def test_bad_options() -> None:
    for message, options in {
        "budget must be in": {"budget": 0.0},
        "budget_modules must be at least 1": {"budget_modules": 0},
        "scope must be 'layer' or 'global'": {"scope": "module"},
        "search_steps must be at least 2": {"search_steps": 1},
        "share_unselected must be 'none' or 'per_type'": {"share_unselected": "all"},
        "after_search must be 'finetune' or 'retrain'": {"after_search": "stop"},
        "search_share must be in": {"search_share": 1.0},
        "arch_beta1 must be in": {"arch_beta1": 1.0},
    }.items():
        with pytest.raises(UserError, match=message):
            config(**options)
