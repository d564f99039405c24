"""ALLoRA: its coefficients, what they scale, and what an optimizer makes of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from toys import TARGETS, Toy, goal, inputs, train, trainable, view

from loratlas import ALLoraConfig, AtlasLoraConfig, UserError
from loratlas.adapters.allora import coefficients


def adapted(config: type = ALLoraConfig, **options: object) -> torch.nn.Module:
    base = Toy(dtype=torch.float64)
    torch.manual_seed(1)
    return get_peft_model(base, config(r=4, target_modules=list(TARGETS), **options))


def test_coefficients_are_eta_at_zero_and_fall_with_the_rows() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    b[0] = 0.0
    b[1] *= 1e6
    c, rows = coefficients(a, b, 4.0), (b @ a).norm(dim=1)
    torch.testing.assert_close(c, (rows + 1 / 16).rsqrt())
    assert c[0] == 4.0
    torch.testing.assert_close(c[1], rows[1].rsqrt(), rtol=1e-6, atol=0)


def test_at_the_start_b_gets_eta_times_loras_gradient_and_a_none() -> None:
    model, plain, x = adapted(eta=3.0), adapted(AtlasLoraConfig, lora_alpha=None), inputs(dtype=torch.float64)
    view(plain).A.data.copy_(view(model).A)
    for one in (model, plain):
        y = one(x)
        (y - goal(y)).square().mean().backward()
    torch.testing.assert_close(view(model).B.grad, 3.0 * view(plain).B.grad)
    assert view(model).A.grad.count_nonzero() == 0


def test_with_sgd_it_is_ahead_of_lora_at_the_same_rate() -> None:
    x, losses = inputs(dtype=torch.float64), {}
    for name, model in {"lora": adapted(AtlasLoraConfig, lora_alpha=None), "allora": adapted(eta=4.0)}.items():
        train(model, x, 20, optimizer=torch.optim.SGD(trainable(model), lr=0.05))
        losses[name] = float((model(x) - goal(model(x))).square().mean())
    assert losses["allora"] < 0.9 * losses["lora"]


def test_scaled_updates_move_the_rows_of_b_by_c_times_adams_step() -> None:
    steps = {}
    for eta in (1.0, 5.0):
        model = adapted(eta=eta, apply_to="update")
        train(model, inputs(dtype=torch.float64), 1)
        steps[eta] = view(model).B.detach()
    torch.testing.assert_close(steps[5.0], 5.0 * steps[1.0])


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 8}, {"lora_dropout": 0.1}, {"eta": 0.0}, {"eta": float("inf")}, {"apply_to": "both"}]
)
def test_what_it_does_not_have_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        ALLoraConfig(r=4, **options)
