"""SoKA beyond the golden vectors: the rank rule, what the terms can learn, and its other starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from toys import adamw, trainable, view

from loratlas import SoKAConfig, UserError
from loratlas.engine.method import View
from loratlas.linalg.kronecker import Shape, kronecker_sum, kronecker_svd

SHAPE = Shape(4, 4, 4, 4)


def soka(weight: torch.Tensor, **options: object) -> tuple[torch.nn.Module, View]:
    net = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    net[0].weight.data.copy_(weight)
    cfg = SoKAConfig(**{"target_modules": ["0"], "factor_shape": [4, 4], **options})
    if cfg.source == "gradient":
        cfg.calibration = {"0": {"gradient": draw(16, 16, seed=3).float()}}
    model = get_peft_model(net, cfg)
    return model, view(model, "0")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_rank_rule_finds_planted_terms_and_records_them() -> None:
    terms = kronecker_sum(draw(2, 4, 4), draw(2, 4, 4, seed=1))
    model, t = soka(terms + 0.01 * draw(16, 16, seed=2), r=8, elbow=False)
    assert t.A.shape == (2, 4, 4)
    assert model.peft_config["default"].rank_pattern == {"^0": 2}
    assert sum(p.numel() for p in trainable(model)) == 2 * (16 + 16)
    _, one = soka(torch.kron(draw(4, 4), draw(4, 4, seed=1)), r=8)
    assert one.A.shape == (1, 4, 4)
    torch.testing.assert_close(kronecker_sum(one.A, one.B), one.layer.base_matrix(), rtol=1e-10, atol=1e-10)


def test_a_saved_rank_wins_over_the_one_that_another_base_would_choose(tmp_path: Path) -> None:
    model, t = soka(kronecker_sum(draw(2, 4, 4), draw(2, 4, 4, seed=1)), r=8, elbow=False)
    model.save_pretrained(tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False, dtype=torch.float64))
    fresh = SoKAConfig(target_modules=["0"], factor_shape=[4, 4], r=8, tau=0.5)
    again = PeftModel.from_pretrained(other, tmp_path, config=fresh)
    assert torch.equal(view(again, "0").A, t.A)
    assert not view(again, "0").A.requires_grad


def test_choosing_a_rank_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    soka(torch.kron(draw(4, 4), draw(4, 4, seed=1)), r=8)
    assert not recwarn.list


def test_one_term_can_change_w_by_a_matrix_of_full_rank() -> None:
    _, t = soka(draw(16, 16), r=1, rank_rule=False)
    with torch.no_grad():
        t.A.add_(draw(1, 4, 4, seed=4))
    assert torch.linalg.matrix_rank(t.layer.method.delta_weight(t)) == 16


def loss_after(goal: torch.Tensor, weight: torch.Tensor, **options: object) -> float:
    torch.manual_seed(0)
    model, t = soka(weight, rank_rule=False, **options)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 2000)
    for _ in range(2000):
        error = (weight + t.layer.method.delta_weight(t) - goal).square().sum()
        error.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return float(error)


def test_a_term_that_is_replaced_is_learned_and_a_new_one_needs_an_extra_term() -> None:
    weight = draw(16, 16)
    u, s, v = kronecker_svd(weight, SHAPE, 1)
    other = torch.kron(draw(4, 4, seed=5), draw(4, 4, seed=6)) / 4
    replaced = weight - s[0] * torch.kron(u[0], v[0]) + other
    assert loss_after(replaced, weight, r=1) < 1e-3
    added = weight + other
    assert loss_after(added, weight, r=1) > 0.5
    assert loss_after(added, weight, r=1, extra_terms=1) < 1e-2


def test_starts_from_the_gradient_and_without_residual() -> None:
    weight = draw(16, 16)
    model, t = soka(weight, r=2, rank_rule=False, source="gradient")
    x = draw(3, 16)
    assert torch.equal(model(x), torch.nn.functional.linear(x, weight))
    u, s, _ = kronecker_svd(draw(16, 16, seed=3).float().double(), SHAPE, 2)
    torch.testing.assert_close(t.A.detach(), s.sqrt()[:, None, None] * u, rtol=1e-6, atol=1e-6)
    _, added = soka(weight, r=2, rank_rule=False, residual=False)
    u, s, v = kronecker_svd(weight, SHAPE, 2)
    torch.testing.assert_close(added.layer.method.delta_weight(added), kronecker_sum(s[:, None, None] * u, v))


def test_bad_input_names_the_module_or_the_field() -> None:
    with pytest.raises(UserError, match=r"^module 0: a 16 x 16 weight has no Kronecker factor of shape 3 x 4"):
        soka(draw(16, 16), factor_shape=[3, 4])
    with pytest.raises(UserError, match=r"^module 0: soka starts from the gradient of this layer"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), SoKAConfig(source="gradient", target_modules=["0"]))
    for field, value in {"tau": 0.0, "r_min": 17, "source": "x", "factor_shape": 3, "extra_terms": -1}.items():
        with pytest.raises(UserError, match=f"^SoKAConfig: {field} must be "):
            SoKAConfig(**{field: value})
