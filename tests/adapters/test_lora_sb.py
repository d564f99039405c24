"""LoRA-SB and LoRA-XS: what their bases are, the gradient identity, and that the first step helps."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, inputs, train, trainable, view

from loratlas import LoraSBConfig, LoraXSConfig, UserError


def config(gradients: dict[str, Tensor] | None = None, **options: object) -> LoraSBConfig:
    made = LoraSBConfig(**{"r": 4, "init_lr": 1e-2, "target_modules": list(TARGETS), **options})
    if gradients is not None:
        made.calibration = {path: {"gradient": gradient} for path, gradient in gradients.items()}
    return made


def gradients(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    (model(x) - target).square().mean().backward()
    return {path: model.get_submodule(path).weight.grad for path in TARGETS}


def test_bases_and_core_are_the_truncated_svd_of_the_first_update() -> None:
    x = inputs()
    found = gradients(Toy(), x, torch.zeros(6, 14))
    model = get_peft_model(Toy(), config(found, lora_alpha=8))
    for path in TARGETS:
        t = view(model, path)
        assert t.scaling == 2.0
        eye = torch.eye(4)
        torch.testing.assert_close(t.B.T @ t.B, eye, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t.A @ t.A.T, eye, rtol=1e-5, atol=1e-5)
        values = t.N.diagonal()
        assert torch.equal(t.N, torch.diag(values))
        assert torch.equal(values, values.sort(descending=True).values)
        assert values[-1] > 0
        u, s, vh = torch.linalg.svd(-1e-2 * found[path].sign())
        exact = (u[:, :4] * s[:4]) @ vh[:4]
        torch.testing.assert_close(t.layer.get_delta_weight("default"), exact, rtol=1e-5, atol=1e-6)


def test_the_raw_update_is_gradient_descent_s() -> None:
    found = gradients(Toy(), inputs(), torch.zeros(6, 14))
    with pytest.warns(UserWarning, match="6 useful directions"):  # six samples
        model = get_peft_model(Toy(), config(found, init_update="raw", r=12, target_modules=["first"]))
    delta = view(model).layer.get_delta_weight("default")
    assert view(model).r == torch.linalg.matrix_rank(found["first"]) == 6
    torch.testing.assert_close(delta, -1e-2 * found["first"], rtol=1e-4, atol=1e-7)


def test_the_start_is_one_step_of_descent_and_only_the_cores_train() -> None:
    base, x = Toy(), inputs()
    target = torch.randn(6, 14, generator=torch.Generator().manual_seed(9))
    model = get_peft_model(copy.deepcopy(base), config(gradients(base, x, target), init_lr=1e-3))
    with torch.no_grad():
        before, after = ((net(x) - target).square().mean() for net in (base, model))
    assert 0 < before - after < 0.1 * before
    bases = [(t.A.clone(), t.B.clone()) for t in (view(model, path) for path in TARGETS)]
    assert sum(p.numel() for p in trainable(model)) == 2 * 16
    train(model, x, 5)
    for path, (a, b) in zip(TARGETS, bases, strict=True):
        assert torch.equal(view(model, path).A, a)
        assert torch.equal(view(model, path).B, b)


def test_it_sees_more_of_the_gradient_than_lora_xs() -> None:
    base, x, target = Toy(dtype=torch.float64), inputs(dtype=torch.float64), torch.zeros(6, 14, dtype=torch.float64)
    found = gradients(base, x, target)
    sb = get_peft_model(copy.deepcopy(base), config(found))
    xs = get_peft_model(copy.deepcopy(base), LoraXSConfig(r=4, init_std=0.0, target_modules=list(TARGETS)))
    for path in TARGETS:
        distances = []
        for model in (sb, xs):
            t = view(model, path)
            # orthonormal bases of the spaces: LoRA-XS carries singular values in A
            left, right = torch.linalg.qr(t.B).Q, torch.linalg.qr(t.A.T).Q
            distances.append(torch.dist(left @ left.T @ found[path] @ right @ right.T, found[path]))
        assert distances[0] < 0.8 * distances[1]


def test_lora_xs_starts_next_to_the_base_model_along_its_principal_directions() -> None:
    base = Toy()
    model = get_peft_model(Toy(), LoraXSConfig(r=4, target_modules=list(TARGETS)))
    t = view(model)
    u, s, vh = torch.linalg.svd(base.first.weight.detach(), full_matrices=False)
    torch.testing.assert_close(t.B @ t.A, (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t.B.T @ t.B, torch.eye(4), rtol=1e-5, atol=1e-5)
    assert 1e-6 < t.N.std() < 1e-4
    assert sum(p.numel() for p in trainable(model)) == 2 * 16


def test_a_calibration_is_needed_and_named() -> None:
    with pytest.raises(UserError, match=r"module first: lora-sb starts from the gradient .* loratlas.calibrate"):
        get_peft_model(Toy(), config())
    broken = gradients(Toy(), inputs(), torch.zeros(6, 14))
    broken["second"][0, 0] = torch.nan
    with pytest.raises(UserError, match=r"module second: .*NaN or infinite"):
        get_peft_model(Toy(), config(broken))


def test_a_layer_without_gradient_starts_at_rest_along_its_weight() -> None:
    base, x = Toy(), inputs()
    found = {"first": torch.zeros(16, 12), "second": torch.zeros(14, 16)}
    model = get_peft_model(copy.deepcopy(base), config(found))
    assert torch.equal(model(x), base(x))
    train(model, x, 3)
    assert not torch.equal(model(x), base(x))


def test_bad_options() -> None:
    with pytest.raises(UserError, match="init_lr must be positive"):
        config(init_lr=0.0)
    with pytest.raises(UserError, match="init_update must be 'sign' or 'raw'"):
        config(init_update="adam")
    with pytest.raises(UserError, match="svd_method must be one of auto, full"):
        config(svd_method="exact")
    with pytest.raises(UserError, match="init_std must be at least 0"):
        LoraXSConfig(init_std=-1.0)
