"""SALT beyond the official trajectories: what its core can and cannot express."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from toys import adamw, inputs, trainable, view

from loratlas import AtlasLoraConfig, SaltConfig, UserError, attach
from loratlas.engine.config import AtlasConfig
from loratlas.engine.layer import joined_factors
from loratlas.engine.method import View

N, K, Q = 12, 4, 2


def salt(**options: object) -> tuple[torch.nn.Module, View]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(N, 16)).double()
    model = get_peft_model(net, SaltConfig(**{"r": Q, "scale_rank": K, "target_modules": ["0"], **options}))
    return model, view(model, "0")


def test_parameters_and_the_number_of_scaled_values() -> None:
    model, t = salt()
    assert sum(p.numel() for p in trainable(model)) == 2 * K + 2 * Q * (N - K)
    assert len(salt(scale_rank=None, scale_ratio=0.34)[1].scale) == 4
    assert len(salt(scale_rank=None, scale_ratio=0.01)[1].scale) == 1
    every = salt(scale_rank=99)[1]
    assert every.X is None
    assert every.layer.method.delta_weight(every).abs().max() == 0.0
    assert float(t.layer.method.distance(t)) == 0.0


def test_shift_and_scale_act_on_single_singular_values() -> None:
    _, t = salt(relu_mode="none")
    w = t.layer.base_matrix()
    with torch.no_grad():
        t.shift[1] = 0.5
        t.scale[2] = 0.0
    changed = t.U.T @ (w + t.layer.method.delta_weight(t)) @ t.V.T
    expected = torch.diag(t.S.clone())
    expected[1, 1] += 0.5
    expected[2, 2] = 0.0
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relu_mode", ["all", "diag", "none"])
def test_the_core_is_block_diagonal_and_relu_acts_where_it_is_said(relu_mode: str) -> None:
    _, t = salt(relu_mode=relu_mode, init_y="normal")
    with torch.no_grad():
        t.Y.mul_(200)
        t.scale[0] = -1.0
    core = t.U.T @ (t.layer.base_matrix() + t.layer.method.delta_weight(t)) @ t.V.T
    top, tail = core[:K, :K], core[K:, K:]
    torch.testing.assert_close(core, torch.block_diag(torch.diag(top.diagonal()), tail), rtol=0, atol=1e-10)
    raw = torch.diag(t.S[K:]) + t.X @ t.Y
    assert float(raw.diagonal().min()) < 0
    expected = {"all": raw.relu(), "none": raw, "diag": torch.diagonal_scatter(raw, raw.diagonal().relu())}[relu_mode]
    torch.testing.assert_close(tail, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(top[0, 0], -t.S[0] if relu_mode == "none" else t.S[0] * 0, rtol=0, atol=1e-10)


def test_without_relu_the_update_and_its_export_have_rank_k_plus_q() -> None:
    _, t = salt(relu_mode="none", init_y="normal")
    with torch.no_grad():
        t.shift.add_(0.1)
    assert joined_factors(t)[0].shape[0] == K + Q
    assert torch.linalg.matrix_rank(t.layer.method.delta_weight(t)) == K + Q
    assert joined_factors(salt()[1])[0].shape[0] == N


def test_at_the_start_only_y_of_the_tail_has_a_gradient() -> None:
    model, t = salt()
    model(inputs(dtype=torch.float64)).square().sum().backward()
    assert float(t.X.grad.abs().max()) == 0.0
    assert float(t.Y.grad.abs().max()) > 0.0


def test_the_distance_from_the_start_enters_the_loss() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(N, N)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.lin(x).square().mean()}

    losses = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        model = get_peft_model(Loss(), SaltConfig(target_modules=["lin"], scale_rank=K, reg_weight=weight))
        optimizer = adamw(model)  # the terms are there as long as it lives
        attach(model, optimizer, total_steps=1)
        t = view(model, "lin")
        with torch.no_grad():
            t.shift[0] = 2.0
        losses.append(float(model(torch.ones(2, N))["loss"]))
    assert losses[1] - losses[0] == pytest.approx(0.5 * 2.0, rel=1e-5)


def fitted(cfg: AtlasConfig, goal: str) -> tuple[float, float]:
    """||W' - W1||_F^2 / 16 before and after 400 AdamW steps: W1 has other singular values, or a rank-2 shift."""
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(16, 16, generator=generator) / 4
    u, s, vh = torch.linalg.svd(w0)
    if goal == "rescaled":
        w1 = u @ torch.diag(s * (0.3 + 1.4 * torch.rand(16, generator=generator))) @ vh
    else:
        w1 = w0 + torch.randn(16, 2, generator=generator) @ torch.randn(2, 16, generator=generator) / 8
    net = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    net[0].weight.data.copy_(w0)
    torch.manual_seed(0)
    model = get_peft_model(net, cfg)
    t, optimizer = view(model, "0"), adamw(model)
    losses = []
    for _ in range(401):
        error = (w0 + t.layer.method.delta_weight(t) - w1).square().sum() / 16
        losses.append(float(error))
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], losses[-1]


def test_it_rescales_the_spectrum_and_cannot_leave_its_blocks() -> None:
    plain = AtlasLoraConfig(r=2, target_modules=["0"])
    core = SaltConfig(r=2, scale_rank=8, relu_mode="none", target_modules=["0"])
    start, lora = fitted(plain, "rescaled")
    assert fitted(core, "rescaled")[1] < 0.05 * start < lora
    start, lora = fitted(plain, "shifted")
    assert lora < 0.01 * start
    assert fitted(core, "shifted")[1] > 0.3 * start


def test_config_errors_name_the_field() -> None:
    for field, value in {
        "scale_ratio": 0.0,
        "scale_rank": 0,
        "relu_mode": "x",
        "init_x": "x",
        "reg_weight": -1,
    }.items():
        with pytest.raises(UserError, match=f"^SaltConfig: {field} must be "):
            SaltConfig(**{field: value})
