"""The statistics of `calibrate` against autograd on the whole model, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratlas import AtlasLoraConfig, UserError
from loratlas.engine.calibrate import calibrate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = Conv1D(4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 6, generator=generator), torch.randint(0, 3, (7,), generator=generator)) for _ in range(3)]


def expected_gradients(net: Net, batches: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """dL_i/dW by autograd, as (out, in)."""
    found: dict[str, list[Tensor]] = {"first": [], "second": []}
    for batch in batches:
        first, second = torch.autograd.grad(loss(net, batch), [net.first.weight, net.second.weight])
        found["first"].append(first)
        found["second"].append(second.T)
    return found


def test_gradient_and_fisher_are_autograds(net: Net, batches: list[tuple[Tensor, Tensor]]) -> None:
    exact = expected_gradients(net, batches)
    config = AtlasLoraConfig(target_modules=["first", "second"])
    found = calibrate(net, config, batches, gather=("gradient", "fisher"), loss=loss)
    assert set(found) == {"first", "second"}
    for path, each in exact.items():
        torch.testing.assert_close(found[path]["gradient"], torch.stack(each).mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[path]["fisher"], torch.stack(each).square().mean(0), rtol=1e-5, atol=1e-9)


def test_activation_is_the_second_moment_over_tokens(net: Net, batches: list[tuple[Tensor, Tensor]]) -> None:
    config = AtlasLoraConfig(target_modules=["first"])
    found = calibrate(net, config, batches, gather=("activation",), loss=loss)
    rows = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(found["first"]["activation"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_steps_limits_the_pass(net: Net, batches: list[tuple[Tensor, Tensor]]) -> None:
    exact = expected_gradients(net, batches[:2])
    found = calibrate(net, AtlasLoraConfig(target_modules=["first"]), iter(batches), steps=2, loss=loss)
    torch.testing.assert_close(found["first"]["gradient"], torch.stack(exact["first"]).mean(0), rtol=1e-5, atol=1e-7)


def test_model_is_left_as_it_was(net: Net, batches: list[tuple[Tensor, Tensor]]) -> None:
    net.head.bias.requires_grad_(False)
    net.first.bias.grad = torch.ones(5)
    net.eval()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    calibrate(net, AtlasLoraConfig(target_modules="all-linear"), batches, gather=("gradient", "activation"), loss=loss)
    assert not net.training
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"head.bias"}
    assert torch.equal(net.first.bias.grad, torch.ones(5))
    assert net.first.weight.grad is None
    assert not net.first._forward_pre_hooks
    assert not net.first.weight._post_accumulate_grad_hooks


def test_bad_input_is_named(net: Net, batches: list[tuple[Tensor, Tensor]]) -> None:
    config = AtlasLoraConfig(target_modules=["first"])
    with pytest.raises(UserError, match=r"cannot gather 'hessian'.*gradient, fisher, activation"):
        calibrate(net, config, batches, gather=("hessian",), loss=loss)
    with pytest.raises(UserError, match="match nothing"):
        calibrate(net, AtlasLoraConfig(target_modules=["nowhere"]), batches, loss=loss)
    with pytest.raises(UserError, match="no batch"):
        calibrate(net, config, [], loss=loss)
    with pytest.raises(UserError, match="target_modules is not set"):
        calibrate(net, AtlasLoraConfig(), batches, loss=loss)
