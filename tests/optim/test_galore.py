"""GaLore: what the paper promises, what it refuses, and updates inside the backward pass."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from steps import TALL, WIDE, feed, normal, regression, run, state_bytes, weights
from torch import nn

from loratlas import UserError
from loratlas.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig


def grouped(parameters: list[nn.Parameter], **options: object) -> list[dict[str, object]]:
    return [{"params": parameters, "rank": 2, **options}]


def test_a_steps_rank_and_that_of_two_subspaces() -> None:
    (p,) = weights((14, 10), dtype=torch.float64)
    start = p.detach().clone()
    optimizer = GaLoreAdamW(grouped([p], update_proj_gap=2))
    run(optimizer, [p], 1)
    assert torch.linalg.matrix_rank(p - start, rtol=1e-6) == 2
    run(optimizer, [p], 3, first=1)
    assert torch.linalg.matrix_rank(p - start, rtol=1e-6) == 4


def test_the_subspace_changes_after_every_gap() -> None:
    parameters = weights(TALL, WIDE)
    optimizer = GaLoreAdamW(grouped(parameters, update_proj_gap=3))
    before: dict[int, torch.Tensor] = {}
    changes = []
    for step in range(7):
        run(optimizer, parameters, 1, first=step)
        now = {
            i: next(optimizer.state[p][s] for s in ("left", "right") if s in optimizer.state[p]).clone()
            for i, p in enumerate(parameters)
        }
        changes.append([i not in before or not torch.equal(before[i], now[i]) for i in now])
        before = now
    assert changes == [[step % 3 == 0] * 2 for step in range(7)]


def test_full_rank_is_adam_in_a_rotated_basis() -> None:
    """With P orthogonal and fixed, the step is P^T Adam(P G)."""
    p, twin = weights(WIDE, WIDE)
    twin.data.copy_(p.data)
    optimizer = GaLoreAdamW([{"params": [p], "rank": 5, "update_proj_gap": 100}], order="torch", eps=1e-8)
    feed([p], 0)
    optimizer.step()
    rotation = optimizer.state[p]["left"]
    inner = nn.Parameter(rotation @ twin.detach())
    adam = torch.optim.AdamW([inner], weight_decay=0.0)
    for step in range(4):
        if step:
            run(optimizer, [p], 1, first=step)
        feed([twin], step)
        inner.grad = rotation @ twin.grad
        adam.step()
    torch.testing.assert_close(rotation @ p, inner, rtol=0, atol=2e-6)


def test_parameters_without_a_rank_take_plain_adamw() -> None:
    ours, theirs = weights((4, 3), (5,)), weights((4, 3), (5,))
    run(GaLoreAdamW(ours, lr=0.01, weight_decay=0.1, order="torch", eps=1e-8), ours, 5)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, eps=1e-8), theirs, 5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_scale_multiplies_the_step() -> None:
    one, other = weights(TALL), weights(TALL)
    run(GaLoreAdamW(grouped(one, scale=2.0), lr=0.01), one, 5)
    run(GaLoreAdamW(grouped(other, scale=1.0), lr=0.02), other, 5)
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_state_is_as_small_as_promised(shape: tuple[int, int]) -> None:
    p = weights(shape)
    optimizer = GaLoreAdamW(grouped(p))
    run(optimizer, p, 2)
    m, n = min(shape), max(shape)
    assert state_bytes(optimizer) == 4 * (m * 2 + 2 * n * 2)


def test_convolutions_are_matrices_in_any_memory_format() -> None:
    conv, matrix = weights((8, 3, 2, 2), (8, 12))
    matrix.data.copy_(conv.data.flatten(1))
    last = nn.Parameter(conv.detach().clone(memory_format=torch.channels_last))
    optimizers = [GaLoreAdamW(grouped([p])) for p in (conv, matrix, last)]
    for step in range(3):
        feed([matrix], step)
        conv.grad = matrix.grad.view(conv.shape)
        last.grad = conv.grad.clone(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(conv.flatten(1), matrix)
    assert torch.equal(last, conv)


def test_a_full_rank_target_is_reached_through_many_subspaces() -> None:
    """LoRA of rank 2 stays above the best error of rank 2."""
    target = normal(20, 16, seed=7)
    best = float(torch.linalg.svdvals(target)[2:].square().sum())
    found = regression(lambda p: GaLoreAdamW([{"params": [p], "rank": 2, "update_proj_gap": 25}], lr=0.05), 1000)
    assert found < 0.1 * best


@pytest.mark.parametrize("moments", ["permute", "reset"])
def test_moments_can_follow_a_new_basis(moments: str) -> None:
    p = weights(TALL)
    optimizer = GaLoreAdamW(grouped(p, basis="dct2", moments=moments, update_proj_gap=2), betas=(0.5, 0.5))
    run(optimizer, p, 2)
    state = optimizer.state[p[0]]
    index, mean = state["right_index"].tolist(), state["exp_avg"].clone()
    run(optimizer, p, 1, first=2)
    new = state["right_index"].tolist()
    feed(p, 2)
    from loratlas.linalg import dct

    reduced = p[0].grad @ dct.vectors("dct2", 6, state["right_index"].long(), 0, torch.float32).T
    for column, vector in enumerate(new):
        stays = moments == "permute" and vector in index
        old = mean[:, index.index(vector)] if stays else torch.zeros(12)
        torch.testing.assert_close(state["exp_avg"][:, column], 0.5 * old + 0.5 * reduced[:, column])


def test_reset_moments_start_adams_correction_again() -> None:
    p, fresh = weights(TALL), weights(TALL)
    optimizer = GaLoreAdamW(grouped(p, moments="reset", update_proj_gap=3))
    run(optimizer, p, 3)
    fresh[0].data.copy_(p[0].data)
    run(optimizer, p, 3, first=3)
    run(GaLoreAdamW(grouped(fresh, update_proj_gap=3)), fresh, 3, first=3)
    assert torch.equal(p[0], fresh[0])


def test_eight_bits_are_near_and_small() -> None:
    pytest.importorskip("torchao")
    exact, coarse = weights((256, 64)), weights((256, 64))
    pair = [cls([{"params": p, "rank": 32}], lr=0.01) for cls, p in ((GaLoreAdamW, exact), (GaLoreAdamW8bit, coarse))]
    run(pair[0], exact, 5)
    run(pair[1], coarse, 5)
    moved = (exact[0] - weights((256, 64))[0]).norm()
    assert (exact[0] - coarse[0]).norm() < 0.1 * moved
    basis = 4 * 32 * 64
    assert state_bytes(pair[1]) - basis < 0.27 * (state_bytes(pair[0]) - basis)
    assert pair[1].state[coarse[0]]["exp_avg"].dtype == torch.uint8


def test_eight_bits_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratlas.optim import eight_bit

    eight_bit._codec.cache_clear()
    for name in ("bitsandbytes", "bitsandbytes.functional", "torchao.optim.subclass_8bit"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UserError, match=r"need bitsandbytes or torchao.*loratlas\[quant\]"):
        GaLoreAdamW8bit(weights(TALL))


# ------------------------------------------------------------------------------------------------------ layerwise


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return (model(normal(3, 6, seed=seed)) - normal(3, 4, seed=50)).square().mean()


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_layerwise_updates_are_the_same_and_free_gradients(optimizer: str) -> None:
    plain, layered = two_layers(), two_layers()
    alive = []
    for model, layerwise in ((plain, False), (layered, True)):
        config = GaLoreConfig(r=2, update_proj_gap=2, optimizer=optimizer, layerwise=layerwise)
        stepper = config.build(model, lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(stepper, 1.0, 0.1, 5)
        for step in range(5):
            loss_of(model, step).backward()
            alive.append(sum(p.grad is not None for p in model.parameters()))
            stepper.step()
            stepper.zero_grad()
            schedule.step()
    assert alive == [4] * 5 + [0] * 5
    for one, other in zip(plain.parameters(), layered.parameters(), strict=True):
        assert torch.equal(one, other)


def test_layerwise_refuses_accumulation_and_ends_with_its_optimizer() -> None:
    model = two_layers()
    optimizer = GaLoreConfig(r=2, layerwise=True).build(model, lr=0.01)
    loss_of(model, 0).backward()
    with pytest.raises(UserError, match=r"2\.weight \(4, 8\) came twice .* gradient_accumulation_steps to 1"):
        (model[2].weight.sum() * 1.0).backward()
    del optimizer
    gc.collect()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ bad input


def test_vectors_have_no_subspace() -> None:
    with pytest.raises(UserError, match=r"shape \(5,\) has no second dimension .* without rank"):
        GaLoreAdamW(grouped(weights(TALL, (5,))))
    with pytest.raises(UserError, match=r"bias \(5,\)"):
        GaLoreAdamW([{"params": [("bias", nn.Parameter(torch.zeros(5)))], "rank": 2}])


def test_a_rank_above_the_matrix_is_cut_with_one_warning() -> None:
    parameters = weights(TALL, WIDE)
    with pytest.warns(UserWarning, match=r"rank 50 is more than the smaller side of 2 matrices") as found:
        optimizer = GaLoreAdamW([{"params": parameters, "rank": 50}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, parameters, 2)
    assert len(found) == 1
    assert optimizer.state[parameters[0]]["right"].shape == (6, 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_gradients_change_nothing(bad: float) -> None:
    parameters = weights(TALL, WIDE, (4,))
    optimizer = GaLoreAdamW([{"params": parameters[:2], "rank": 2, "update_proj_gap": 1}, {"params": parameters[2:]}])
    feed(parameters, 0)
    parameters[1].grad[0, 0] = bad
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(UserError, match=r"shape \(5, 9\) holds NaN or infinite entries"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not any(optimizer.state.values())


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = GaLoreAdamW(grouped(list(table.parameters())))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"moments": "permute"}, "moments"),
        ({"moments": "forget"}, "moments"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"state_dtype": "int8"}, "state_dtype"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"order": "first"}, "order"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as error:
        GaLoreAdamW(grouped(weights(TALL), **options))
    assert error.value.field == field


def test_adafactors_rates() -> None:
    with pytest.raises(UserError, match="needs a learning rate"):
        GaLoreAdafactor(weights(TALL), relative_step=False)
    with pytest.raises(UserError, match="set lr to None"):
        GaLoreAdafactor(weights(TALL), lr=0.1)
    p = weights(TALL)
    optimizer = GaLoreAdafactor(grouped(p))
    before = p[0].detach().clone()
    run(optimizer, p, 1)
    # u has rms 1 at most; relative_step's first rate is 1e-2, times rms(W)
    moved = (p[0] - before).detach() @ optimizer.state[p[0]]["right"].T
    rms = float(before.square().mean().sqrt())
    assert 0.5 * 1e-2 * rms < float(moved.norm() / 24**0.5) <= 1e-2 * rms * 1.0001


def test_adafactors_decay_has_its_rate() -> None:
    plain, decayed = weights(TALL, (4,)), weights(TALL, (4,))
    rates = []
    for parameters, weight_decay in ((plain, 0.0), (decayed, 0.5)):
        groups = [{"params": parameters[:1], "rank": 2}, {"params": parameters[1:]}]
        rates = [1e-2 * float(p.detach().square().mean().sqrt()) for p in parameters]
        run(GaLoreAdafactor(groups, weight_decay=weight_decay), parameters, 1)
    for one, other, start, rate in zip(plain, decayed, weights(TALL, (4,)), rates, strict=True):
        torch.testing.assert_close(one - other, 0.5 * rate * start, rtol=0, atol=1e-6)


def test_a_warning_free_build() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaLoreConfig(r=2).build(two_layers(), lr=0.01)
