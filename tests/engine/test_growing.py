"""What all methods with a growing rank share: budget, slots that never change shape, resume, export, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from toys import TARGETS, Toy, adamw, goal, inputs, train, trainable, view, views

from loratlas import IncreLoraConfig, TriAdaptLoraConfig, UserError, attach
from loratlas.engine.export import export_lora
from loratlas.engine.growing import GrowingConfig

METHODS = {"increlora": IncreLoraConfig, "triadaptlora": TriAdaptLoraConfig}
SCHEDULE = {"init_warmup": 1, "incre_interval": 2, "total_step": 12}
STEPS = 12


def config(name: str, **options: Any) -> GrowingConfig:
    known = {"r": 4, "target_modules": list(TARGETS), "incre_rank_num": 2, "init_warmup": 1, "incre_interval": 2}
    return METHODS[name](**{**known, **options})


def grown(name: str, steps: int = STEPS, **options: Any) -> PeftModel:
    model = get_peft_model(Toy(), config(name, **options))
    train(model, inputs(), steps, total=STEPS)
    return model


def ranks(model: torch.nn.Module) -> list[int]:
    return [int(t.rank) for t in views(model)]


@pytest.mark.parametrize("name", METHODS)
def test_growth_uses_up_the_budget_and_no_more(name: str) -> None:
    model = get_peft_model(Toy(), config(name, r_max=5))
    before = {key: (id(p), p.shape) for key, p in model.named_parameters()}
    totals: list[int] = []
    train(model, inputs(), STEPS, each=lambda step: totals.append(sum(ranks(model))))
    assert totals[0] == 2
    assert totals[-1] == 2 * 4
    assert sorted(totals) == totals
    assert max(ranks(model)) <= 5
    assert {key: (id(p), p.shape) for key, p in model.named_parameters()} == before
    for t in views(model):
        assert int(t.rank_log[0, 0]) == 0
        assert t.rank_log[:, 1].tolist() == sorted({1, *t.rank_log[:, 1].tolist()})
        assert int(t.rank_log[-1, 1]) == int(t.rank)
        # rounds are at the steps 2, 4, ... from 0: the 3rd, 5th, ... from 1
        assert all(step % 2 == 1 for step in t.rank_log[1:, 0].tolist())


@pytest.mark.parametrize("name", METHODS)
def test_a_total_of_its_own(name: str) -> None:
    assert sum(ranks(grown(name, target_total_rank=7))) == 7
    assert ranks(grown(name, init_r=4)) == [4, 4]


@pytest.mark.parametrize("name", METHODS)
def test_the_default_schedule_fits_runs_of_all_lengths(name: str) -> None:
    for steps in (20, 100, 1000):
        model = get_peft_model(Toy(), METHODS[name](r=4, target_modules=list(TARGETS)))
        plan = view(model).layer.method.plan(views(model), steps)
        t = view(model)
        assert plan.warmup == steps // 10
        assert t.layer.method.reach(plan, 2, t.cfg, steps) == plan.budget == 8
        assert t.layer.method.reach(plan, 2, t.cfg, steps * 2 // 3) == 8, "growth leaves time to train what has grown"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_resume_is_exact(name: str, stop_at: int, tmp_path: Path) -> None:
    x, whole = inputs(), grown(name)
    first = get_peft_model(Toy(), config(name))
    optimizer = adamw(first)
    train(first, x, stop_at, total=STEPS, optimizer=optimizer)
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    optimizer = adamw(second)
    optimizer.load_state_dict(state)
    train(second, x, STEPS - stop_at, optimizer=optimizer)
    for ours, theirs in zip(views(second), views(whole), strict=True):
        for key in (*ours.layer.method.params, *ours.layer.buffer_names()):
            assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    assert torch.equal(second(x), whole(x))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [4, STEPS])
def test_the_export_has_the_live_ranks_alone(name: str, steps: int, tmp_path: Path) -> None:
    model = grown(name, steps)
    report = export_lora(model, tmp_path / "lora", ranks="each")
    live = [t.layer.method.exported_rank(t) for t in views(model)]
    if steps == STEPS:
        assert live == ranks(model)
    assert report.rank == max(live) < len(view(model).born)
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sorted(len(t) for key, t in held.items() if "lora_A" in key) == sorted(live)
    stock = PeftModel.from_pretrained(Toy(), tmp_path / "lora")
    torch.testing.assert_close(stock(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_stage_grows_on(name: str) -> None:
    model, x = grown(name), inputs()
    y = model(x)
    model.peft_config["default"].r = 6
    model.peft_config["default"].target_total_rank = 12
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=STEPS, restart=True)
    assert torch.equal(model(x), y)
    assert [t.rank_log.tolist() for t in views(model)] == [[[0, int(t.rank)]] for t in views(model)]
    train(model, x, STEPS, optimizer=optimizer)
    assert sum(ranks(model)) == 12
    assert bool(torch.isfinite(model(x)).all())


@pytest.mark.parametrize("name", METHODS)
def test_one_clear_sentence(name: str, tmp_path: Path) -> None:
    def refused(pattern: str, total: int | None = STEPS, **options: Any) -> None:
        model = get_peft_model(Toy(), config(name, **options))
        with pytest.raises(UserError, match=pattern):
            attach(model, adamw(model), total_steps=total)

    refused(rf"{name} spreads its growth .* total_steps=N", None, incre_interval=None)
    refused(r"2 modules start with 6 ranks in all, more than the 5", init_r=3, target_total_rank=5)
    refused(
        r"in 12 steps .* every 100 after step 1, get from 2 to 2 of the 8 ranks .*lower init_warmup", incre_interval=100
    )
    refused(r"every 2 after step 11, get from 2 to 2 of the 8", init_warmup=11)
    for field, value, what in (
        ("init_r", 5, "between 1 and r=4"),
        ("r_max", 3, "at least r=4"),
        ("incre_interval", 0, "at least 1"),
        ("allocation", "fair", "one of exact, official"),
        ("orth_reg_weight", -1.0, "at least 0"),
    ):
        with pytest.raises(UserError, match=f"{field} must be {what}"):
            config(name, **{field: value})
    grown(name, 5).save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True, config=config(name, target_total_rank=6))
    with pytest.raises(UserError, match="planned for 8 ranks in all and goes on with 6: resume it with the r"):
        attach(other, adamw(other), total_steps=STEPS)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_too_short_for_its_own_schedule_is_told(name: str) -> None:
    model = get_peft_model(Toy(), METHODS[name](r=4, target_modules=list(TARGETS)))
    with pytest.warns(UserWarning, match="in 1 steps .* get from 2 to 2 of the 8 ranks of its budget: train longer"):
        attach(model, adamw(model), total_steps=1)


@pytest.mark.parametrize("name", METHODS)
def test_the_penalty_sees_live_slots_alone(name: str) -> None:
    model = grown(name, orth_reg_weight=0.3)
    lifecycle = attach(model, torch.optim.AdamW(trainable(model)), total_steps=STEPS, restart=True)
    total = 0.0
    for t in views(model):
        k = int(t.rank)
        a, b = t.A[:k].detach(), t.B[:, :k].detach()
        total += float((a @ a.T - torch.eye(k)).norm() + (b.T @ b - torch.eye(k)).norm())
    found = lifecycle.terms().detach()
    assert float(found) == pytest.approx(0.3 * total / 4, rel=1e-5)
    off = get_peft_model(Toy(), config(name, orth_reg_weight=0.0))
    assert attach(off, adamw(off), total_steps=STEPS).terms() == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_new_slots_move_as_under_a_fresh_adam(name: str) -> None:
    """A slot of A that came to life in an early step, against a tensor of its own from then on."""
    options: dict[str, Any] = {"orth_reg_weight": 0.0, "incre_rank_num": 1, "incre_interval": 1}
    if name == "increlora":
        options |= {"restart_warmup": False, "advance_learn": False, "top_h": 2}
    model = get_peft_model(Toy(dtype=torch.float64), config(name, **options))
    t, x, optimizer = view(model), inputs(dtype=torch.float64), adamw(model, weight_decay=0.1)
    own: list[tuple[torch.nn.Parameter, torch.optim.Optimizer]] = []
    attach(model, optimizer, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        y = model(x)
        (y - goal(y)).square().mean().backward()
        for twin, alone in own:
            twin.grad = t.A.grad[1].clone()
            alone.step()
        optimizer.step()
        optimizer.zero_grad()
        for twin, _ in own:
            torch.testing.assert_close(t.A[1], twin, rtol=1e-9, atol=1e-12, msg=f"step {step}")
        if int(t.born[1]) == step:
            twin = torch.nn.Parameter(t.A[1].detach().clone())
            own.append((twin, torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.1)))
    assert len(own) == 1
    assert 1 < int(t.born[1]) < STEPS
