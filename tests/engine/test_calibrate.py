"""The statistics of `calibrate` against autograd on the whole model, what it leaves behind, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratlas
from loratlas import AtlasLoraConfig, UserError, calibrate
from loratlas.engine.calibrate import needs

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = Conv1D(4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))


class Repeated(nn.Module):
    """One layer used three times in a step, and a second one that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.tied(x)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def config(*targets: str) -> AtlasLoraConfig:
    return AtlasLoraConfig(target_modules=list(targets))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 6, generator=generator), torch.randint(0, 3, (7,), generator=generator)) for _ in range(3)]


def expected_gradients(net: Net, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """dL_i/dW by autograd, as (out, in)."""
    found: dict[str, list[Tensor]] = {"first": [], "second": []}
    for batch in batches:
        first, second = torch.autograd.grad(loss(net, batch), [net.first.weight, net.second.weight])
        found["first"].append(first)
        found["second"].append(second.T)
    return found


@pytest.mark.parametrize("gather", [("gradient",), ("fisher",), ("gradient", "fisher")])
def test_gradient_and_fisher_are_autograds(net: Net, batches: list[Batch], gather: tuple[str, ...]) -> None:
    exact = expected_gradients(net, batches)
    found = calibrate(net, config("first", "second"), batches, gather=gather, loss=loss)
    for path, each in exact.items():
        expected = {"gradient": torch.stack(each).mean(0), "fisher": torch.stack(each).square().mean(0)}
        assert set(found[path]) == set(gather)
        for name in gather:
            torch.testing.assert_close(found[path][name], expected[name], rtol=1e-5, atol=1e-9)


def test_activation_is_the_second_moment_over_tokens(net: Net, batches: list[Batch]) -> None:
    inputs = iter(batches)
    # no loss is needed, and so none is asked for
    found = calibrate(net, config("first"), lambda: net(next(inputs)[0]), steps=3, gather=("activation",))
    rows = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(found["first"]["activation"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_a_step_function_and_dictionaries_give_the_same(net: Net, batches: list[Batch]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=loss(self.net, (x, labels)))

    model, source = Model(), iter(batches)
    dictionaries = [{"x": x, "labels": labels} for x, labels in batches]
    found = [
        calibrate(model, config("first"), dictionaries, gather=("gradient",)),
        calibrate(model, config("first"), lambda: loss(net, next(source)), steps=3, gather=("gradient",)),
    ]
    assert torch.equal(found[0]["net.first"]["gradient"], found[1]["net.first"]["gradient"])
    with pytest.raises(UserError, match="no dictionary"):
        calibrate(model, config("first"), batches, gather=("gradient",))
    with pytest.raises(UserError, match=r"scalar loss, but it gave NoneType: batches need labels"):
        calibrate(net, config("first"), [{"x": batches[0][0]}], gather=("gradient",))


def test_steps_limits_the_pass_and_short_data_are_named(net: Net, batches: list[Batch]) -> None:
    exact = expected_gradients(net, batches[:2])
    found = calibrate(net, config("first"), iter(batches), 2, gather=("gradient",), loss=loss)
    torch.testing.assert_close(found["first"]["gradient"], torch.stack(exact["first"]).mean(0), rtol=1e-5, atol=1e-7)
    for source in (batches[:2], short_step(net, batches[:2])):
        with pytest.warns(UserWarning, match="ended after 2 of 5 batches"):
            short = calibrate(net, config("first"), source, 5, gather=("gradient",), loss=loss)
        assert torch.equal(short["first"]["gradient"], found["first"]["gradient"])


def short_step(net: Net, batches: list[Batch]) -> object:
    source: Iterator[Batch] = iter(batches)
    return lambda: loss(net, next(source))


def test_repeated_layers_count_once_and_tied_ones_apart(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    net = Repeated()
    apart = Repeated()
    apart.load_state_dict(net.state_dict())
    apart.tied.weight = nn.Parameter(net.again.weight.detach().clone())
    each = [torch.autograd.grad(loss(apart, b), [apart.again.weight, apart.tied.weight]) for b in batches]
    found = calibrate(net, config("again", "tied"), batches, gather=("gradient", "fisher"), loss=loss)
    for path, exact in zip(("again", "tied"), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found[path]["gradient"], torch.stack(exact).mean(0), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found[path]["fisher"], torch.stack(exact).square().mean(0), rtol=1e-5, atol=1e-10)
    assert net.tied.weight is net.again.weight


def test_a_gradient_that_comes_in_parts_is_squared_whole(batches: list[Batch]) -> None:
    """Reentrant checkpointing runs one backward a segment, so a layer in two segments is reported twice."""
    from torch.utils.checkpoint import checkpoint

    class Segmented(Repeated):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            for _ in range(3):
                x = checkpoint(lambda h: torch.tanh(self.again(h)), x, use_reentrant=True)
            return self.tied(x)

    found = []
    for kind in (Repeated, Segmented):
        torch.manual_seed(0)
        found.append(calibrate(kind(), config("again"), batches, gather=("fisher",), loss=loss)["again"]["fisher"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(net: Net, batches: list[Batch], training: bool) -> None:
    net.head.bias.requires_grad_(False)
    net.first.bias.grad = torch.ones(5)
    net.train(training)
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    calibrate(net, config("first", "second", "head"), batches, gather=("gradient",), loss=loss)
    assert net.training == training
    for name, p in net.named_parameters():
        same, value, flag = before[name]
        assert p is same
        assert torch.equal(p, value)
        assert p.requires_grad == flag
        assert p.grad is None or name == "first.bias"
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.first.bias.grad, torch.ones(5))
    assert not net.first._forward_pre_hooks
    assert not net.first.weight._post_accumulate_grad_hooks


def test_the_model_is_restored_when_a_step_fails(net: Net) -> None:
    weight = net.first.weight

    def step() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(net, config("first"), step, 2, gather=("gradient", "activation"))
    assert net.first.weight is weight
    assert all(p.requires_grad for p in net.parameters())
    assert not net.first._forward_pre_hooks


def test_16_bit_models_are_summed_in_fp32(net: Net, batches: list[Batch]) -> None:
    net.bfloat16()
    many = [(x.bfloat16(), labels) for x, labels in batches] * 40
    found = calibrate(net, config("first"), many, gather=("gradient", "activation"), loss=loss)["first"]
    short = calibrate(net, config("first"), many[:3], gather=("gradient", "activation"), loss=loss)["first"]
    for name in ("gradient", "activation"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], short[name], rtol=1e-5, atol=1e-8)  # a bf16 sum would be off by 1e-2


def test_one_gradient_lives_at_a_time(net: Net, batches: list[Batch]) -> None:
    alive: list[int] = []

    def watch(*_: object) -> None:
        alive.append(sum(p.grad is not None for p in net.parameters()))

    for module in (net.first, net.second, net.head):
        module.register_full_backward_hook(watch)
    calibrate(net, config("first", "second", "head"), batches, gather=("gradient",), loss=loss)
    assert alive
    assert max(alive) <= 1


def test_non_finite_and_zero_gradients_are_named(net: Net, batches: list[Batch]) -> None:
    broken = [(x * float("inf"), labels) for x, labels in batches]
    with pytest.raises(UserError, match="gradient of module first is not finite"):
        calibrate(net, config("first", "second"), [*batches, *broken], gather=("gradient",), loss=loss)
    with pytest.warns(UserWarning, match="nothing reached 1 of 2 modules, the first is first") as seen:
        found = calibrate(
            net, config("first", "head"), lambda: net.head(torch.ones(1, 4)).sum(), 1, gather=("gradient",)
        )
    assert len(seen) == 1
    assert torch.equal(found["first"]["gradient"], torch.zeros(5, 6))


def test_what_a_configuration_needs(net: Net, batches: list[Batch]) -> None:
    assert needs(config("first")) == ()
    assert needs(LoraConfig()) == ()
    with pytest.raises(UserError, match="needs no calibration"):
        calibrate(net, config("first"), batches, loss=loss)


def test_statistics_are_stored_and_let_go(net: Net, batches: list[Batch]) -> None:
    wanted = config("first")
    found = calibrate(net, wanted, batches, gather=("fisher",), loss=loss)
    assert wanted.calibration is found
    get_peft_model(net, wanted)
    assert wanted.calibration is None
    assert set(found) == {"first"}
    with pytest.raises(UserError, match=r"base_model\.model\.first already has an adapter"):
        calibrate(get_peft_model(Net(), config("first")), config("first"), batches, gather=("fisher",), loss=loss)


def test_bad_input_is_named(net: Net, batches: list[Batch]) -> None:
    def run(targets: AtlasLoraConfig, source: object, *, gather: tuple[str, ...] = ("gradient",), **more: int) -> None:
        loratlas.calibrate(net, targets, source, gather=gather, loss=loss, **more)

    with pytest.raises(UserError, match=r"cannot gather 'hessian'.*gradient, fisher, activation"):
        run(config("first"), batches, gather=("hessian",))
    with pytest.raises(UserError, match="match nothing"):
        run(config("nowhere"), batches)
    with pytest.raises(UserError, match="no batch"):
        run(config("first"), [])
    with pytest.raises(UserError, match="target_modules is not set"):
        run(AtlasLoraConfig(), batches)
    with pytest.raises(UserError, match="steps must be at least 1"):
        run(config("first"), batches, steps=0)
    with pytest.raises(UserError, match="how often to call the function"):
        run(config("first"), lambda: net(batches[0][0]).sum())
    with pytest.raises(UserError, match="does not depend on the target layers"):
        run(config("first"), lambda: net(batches[0][0]).sum().detach(), steps=1)
    with pytest.raises(UserError, match=r"module norm is a BatchNorm1d without a dense weight"):
        run(config("norm"), batches)
    net.first.weight = type("Int8Params", (nn.Parameter,), {})(net.first.weight.detach())
    with pytest.raises(UserError, match=r"module first is a Linear without a dense weight.*quantised"):
        run(config("first"), batches)
    inputs = calibrate(net, config("first"), batches, gather=("activation",), loss=loss)  # needs no gradient
    assert inputs["first"]["activation"].shape == (6, 6)
