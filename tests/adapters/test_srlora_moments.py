"""What happens to Adam's moments of pairs that start again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import adamw, adapted, inputs, train, view

from loratlas import UserError, attach
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.moments import age_correction, fresh_rate, treat_moments


def stepped(how: str, dim: int) -> tuple[Tensor, torch.optim.Optimizer, dict[str, Tensor]]:
    """A parameter with five steps of Adam behind it and slots 1 and 3 treated; the state before the treatment."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
    optimizer = torch.optim.AdamW([param], lr=1e-2)
    for _ in range(5):
        param.grad = torch.randn(4, 4, generator=generator)
        optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[param].items()}
    treat_moments(StepContext(optimizer, 5, 10), param, dim, torch.tensor([1, 3]), how)
    return param, optimizer, before


@pytest.mark.parametrize("dim", [0, 1])
def test_each_mode_by_hand(dim: int) -> None:
    slots, kept = torch.tensor([1, 3]), torch.tensor([0, 2])
    for how in ("keep", "zero", "corrected", "mean_v"):
        param, optimizer, before = stepped(how, dim)
        state = optimizer.state[param]
        assert state["step"] == before["step"] == 5
        for name in ("exp_avg", "exp_avg_sq"):
            old, new = before[name], state[name]
            assert torch.equal(new.index_select(dim, kept), old.index_select(dim, kept))
            fresh = new.index_select(dim, slots)
            if how == "keep":
                assert torch.equal(fresh, old.index_select(dim, slots))
            elif how == "mean_v" and name == "exp_avg_sq":
                mean = old.index_select(dim, kept).mean(dim, keepdim=True)
                torch.testing.assert_close(fresh, mean.expand_as(fresh), rtol=1e-6, atol=0)
            else:
                assert torch.equal(fresh, torch.zeros_like(fresh))


def test_mean_v_without_survivors_is_zero_and_no_state_is_no_matter() -> None:
    param, optimizer, _ = stepped("keep", 0)
    context = StepContext(optimizer, 5, 10)
    treat_moments(context, param, 0, torch.arange(4), "mean_v")
    assert not optimizer.state[param]["exp_avg_sq"].any()
    fresh = torch.optim.AdamW([param], lr=1e-2)
    for how in ("zero", "mean_v", "corrected"):
        treat_moments(StepContext(fresh, 1, 10), param, 0, torch.tensor([0]), how)
    assert not fresh.state


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dim", [0, 1])
def test_corrected_moves_as_a_fresh_adam(optimizer_class: type[torch.optim.Optimizer], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = {"lr": 1e-2, "weight_decay": 0.1 if optimizer_class is torch.optim.AdamW else 0.0}
    param = torch.nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    optimizer = optimizer_class([param], **settings)
    born, slots = torch.zeros(param.shape[dim], dtype=torch.int64), torch.tensor([2])
    twin = optimizer_twin = None
    for step in range(1, 40):
        context = StepContext(optimizer, step, 40)
        gradient = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        param.grad = gradient.clone()
        correct = age_correction(param, dim, born, context)
        optimizer.step()
        correct()
        if twin is not None:
            twin.grad = gradient.index_select(dim, slots)
            optimizer_twin.step()
            torch.testing.assert_close(param.index_select(dim, slots), twin, rtol=1e-12, atol=1e-12)
        if step == 7:
            treat_moments(context, param, dim, slots, "corrected")
            born[slots] = step
            twin = torch.nn.Parameter(param.detach().index_select(dim, slots).clone())
            optimizer_twin = optimizer_class([twin], **settings)


def test_moments_through_a_whole_run() -> None:
    for how in ("zero", "mean_v"):
        model, x = adapted("srlora", optimizer_reset=how), inputs()
        optimizer = adamw(model)
        train(model, x, steps=4, total=20, optimizer=optimizer)
        t = view(model)
        slots = t.log[:, 1]
        assert len(slots) == 2
        for param, dim in ((t.A, 0), (t.B, 1)):
            state = optimizer.state[param]
            assert not state["exp_avg"].index_select(dim, slots).any()
            assert state["exp_avg_sq"].index_select(dim, slots).any() == (how == "mean_v")
            assert state["exp_avg"].any()


@pytest.mark.parametrize("how", ["keep", "zero", "corrected", "mean_v"])
def test_the_rate_of_fresh_slices_is_that_of_adam(how: str) -> None:
    """Under a gradient that stays what it is, slot 1 against slot 0."""
    param = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = torch.optim.Adam([param], lr=1e-2, eps=1e-30)
    born = torch.zeros(2, dtype=torch.int64)
    for step in range(1, 60):
        context = StepContext(optimizer, step, 60)
        param.grad = torch.full((2, 3), 0.3, dtype=torch.float64)
        before = param.detach().clone()
        correct = age_correction(param, 0, born, context) if how == "corrected" else (lambda: None)
        optimizer.step()
        correct()
        change = param.detach() - before
        expected = 1.0 if step <= 20 else fresh_rate(how, step - 20, step, (0.9, 0.999))
        torch.testing.assert_close(change[1] / change[0], torch.full_like(change[0], expected), rtol=1e-6, atol=0)
        if step == 20:
            treat_moments(context, param, 0, torch.tensor([1]), how)
            born[1] = step


def test_corrected_needs_an_adam() -> None:
    model = adapted("srlora", optimizer_reset="corrected")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(UserError, match="'corrected' is exact for Adam and AdamW only, not for SGD"):
        attach(model, optimizer, total_steps=10)
