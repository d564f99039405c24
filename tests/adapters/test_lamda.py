"""LaMDA and LaMDA++: the schedule of freezing, the optimizer's state, resuming, and ranks by spectrum."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from toys import TARGETS, Toy, adamw, goal, inputs, train, trainable, view, views

from loratlas import LamdaConfig, UserError, attach


def config(**options: object) -> LamdaConfig:
    return LamdaConfig(**{"r": 4, "freeze_fraction": 0.5, "target_modules": list(TARGETS), **options})


def test_the_start_is_the_principal_part_taken_out() -> None:
    model, x = get_peft_model(Toy(), config(lora_alpha=2)), inputs()
    base, t = Toy(), view(model)
    torch.testing.assert_close(t.A @ t.A.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t.B.T @ t.B, torch.eye(4), rtol=1e-5, atol=1e-5)
    values = t.N.diagonal() * t.scaling
    assert torch.equal(t.N, torch.diag(t.N.diagonal()))
    torch.testing.assert_close(values, torch.linalg.svdvals(base.first.weight)[:4])
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_columns_freeze_one_after_the_other_whatever_the_optimizer_remembers(weight_decay: float) -> None:
    model = get_peft_model(Toy(), config())
    t, steps = view(model), 16  # B is frozen at step 8, a column every second step
    optimizer = adamw(model, weight_decay=weight_decay)
    before = {"A": t.A.clone(), "N": t.N.clone(), "B": t.B.detach().clone()}

    def check(step: int) -> None:
        frozen = min(4, step // 2)
        moved = (t.B.detach() != before["B"]).any(0).tolist()
        assert moved == [column >= frozen for column in range(4)], f"step {step}"
        assert torch.equal(t.A, before["A"])
        assert not torch.equal(t.N, before["N"])
        before.update(N=t.N.clone(), B=t.B.detach().clone())
        assert (t.B in optimizer.state) == t.B.requires_grad == (frozen < 4)

    train(model, inputs(), steps, optimizer=optimizer, each=check)
    assert sum(p.numel() for p in trainable(model)) == 2 * 16


def test_a_clipped_norm_does_not_see_frozen_columns() -> None:
    model, x = get_peft_model(Toy(), config()), inputs()
    t = view(model)
    train(model, x, 5, total=16)  # column by column: two are frozen in step 5, three in step 6
    y = model(x)
    (y - goal(y)).square().mean().backward()
    norms = t.B.grad.norm(dim=0)
    assert (norms == 0).tolist() == [True, True, True, False]


def test_all_from_the_start_is_a_core_between_spectral_bases() -> None:
    model = get_peft_model(Toy(), config(freeze_fraction=0.0))
    before = view(model).B.detach().clone()
    train(model, inputs(), 3)
    assert torch.equal(view(model).B, before)
    assert sum(p.numel() for p in trainable(model)) == 2 * 16


def test_the_whole_run_lets_the_last_column_train_to_the_end() -> None:
    model = get_peft_model(Toy(), config(freeze_fraction=1.0))
    t, moved = view(model), []
    before = [t.B.detach().clone()]

    def note(step: int) -> None:
        moved.append(int((t.B.detach() != before[0]).any(0).sum()))
        before[0] = t.B.detach().clone()

    train(model, inputs(), 8, each=note)
    assert moved == [4, 3, 3, 2, 2, 1, 1, 0]


@pytest.mark.parametrize("stop_at", [3, 5, 9])
def test_resume_is_exact(stop_at: int, tmp_path: Path) -> None:
    x, steps = inputs(), 12  # B is frozen at step 6
    whole = get_peft_model(Toy(), config())
    train(whole, x, steps)

    first = get_peft_model(Toy(), config())
    optimizer = adamw(first)
    train(first, x, stop_at, total=steps, optimizer=optimizer)
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    optimizer = adamw(second)
    optimizer.load_state_dict(state)
    train(second, x, steps - stop_at, total=steps, optimizer=optimizer)
    assert torch.equal(second(x), whole(x))
    for ours, theirs in zip(views(second), views(whole), strict=True):
        for name in ("A", "N", "B", "N0", "B0"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_switched_adapter_stays_frozen() -> None:
    model, x = get_peft_model(Toy(), config()), inputs()
    optimizer = adamw(model)
    train(model, x, 6, total=8, optimizer=optimizer)
    model.add_adapter("other", config())
    model.set_adapter("other")
    model.set_adapter("default")  # PEFT lets B have gradients again
    before, core = view(model).B.detach().clone(), view(model).N.detach().clone()
    train(model, x, 2, total=8, optimizer=optimizer)
    assert torch.equal(view(model).B, before)
    assert not torch.equal(view(model).N, core)
    assert view(model).B not in optimizer.state


def test_the_plan_needs_the_number_of_steps() -> None:
    model = get_peft_model(Toy(), config())
    with pytest.raises(UserError, match="total_steps=N"):
        attach(model, adamw(model))
    unplanned = get_peft_model(Toy(), config(freeze_fraction=0.0))
    attach(unplanned, adamw(unplanned))


class Stack(nn.Module):
    """Layers whose spectra fall as i^-power: 0 is flat."""

    def __init__(self, powers: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for power in powers:
            layer = nn.Linear(16, 16)
            q, p = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
            layer.weight.data.copy_(q * torch.arange(1.0, 17.0) ** -power @ p)
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def ranks(powers: tuple[float, ...], **options: object) -> list[int]:
    made = LamdaConfig(**{"r": 4, "rank_allocation": "spectrum", "target_modules": "all-linear", **options})
    return [t.r for t in views(get_peft_model(Stack(powers), made))]


def test_lamda_plus_plus_gives_flat_spectra_more_rank() -> None:
    found = ranks((0.0, 0.5, 1.0, 1.5, 2.0))
    assert found == [6, 5, 4, 3, 2]
    assert ranks((1.0, 2.0, 0.0, 1.5, 0.5)) == [4, 2, 6, 3, 5]
    assert ranks((0.0, 1.0, 2.0), r_min=1) == [6, 4, 2]  # ranks 1 to 7 for three layers
    assert ranks((0.0, 1.0, 2.0), rank_pattern={"layers.1": 9}) == [5, 9, 3]
    assert sum(ranks((0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8))) == 7 * 4


def test_the_ranks_are_saved_and_not_chosen_again(tmp_path: Path) -> None:
    made = LamdaConfig(r=4, rank_allocation="spectrum", target_modules="all-linear")
    model = get_peft_model(Stack((0.0, 2.0)), made)
    x = torch.randn(3, 16)
    train(model, x, 4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Stack((0.0, 2.0)), tmp_path)
    assert [t.r for t in views(again)] == [t.r for t in views(model)]
    assert torch.equal(again(x), model(x))


def test_bad_options() -> None:
    with pytest.raises(UserError, match="freeze_fraction must be in"):
        config(freeze_fraction=1.5)
    with pytest.raises(UserError, match="freeze_schedule must be 'linear' or 'code'"):
        config(freeze_schedule="cosine")
    with pytest.raises(UserError, match="r_min must be between 1 and r=4"):
        config(rank_allocation="spectrum", r_min=5)
    with pytest.raises(UserError, match=r"r_max must be 2 r - r_min = 6.* but it is 9"):
        config(rank_allocation="spectrum", r_max=9)
    with pytest.raises(UserError, match="rank_allocation"):
        config(r_min=2)
