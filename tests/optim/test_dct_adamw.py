"""DCT-AdamW: moments follow their vectors, error feedback loses nothing, no dense projector is kept."""

from __future__ import annotations

import warnings

import pytest
import torch
from steps import TALL, WIDE, feed, normal, run, state_bytes, weights
from torch import nn

from loratlas import UserError
from loratlas.optim.dct_adamw import DCTAdamW, DCTAdamWConfig


def grouped(parameters: list[nn.Parameter], **options: object) -> list[dict[str, object]]:
    return [{"params": parameters, "rank": 2, **options}]


def test_full_rank_is_adamw_in_the_fixed_basis() -> None:
    ours, theirs = weights(TALL), weights(TALL)
    from loratlas.linalg.dct import dct2, dct3

    run(DCTAdamW([{"params": ours, "rank": 6}], lr=0.01, weight_decay=0.1), ours, 5)
    inner = nn.Parameter(dct2(theirs[0].detach()))
    adam = torch.optim.AdamW([inner], lr=0.01, weight_decay=0.1)
    for step in range(5):
        feed(theirs, step)
        inner.grad = dct2(theirs[0].grad)
        adam.step()
    torch.testing.assert_close(ours[0], dct3(inner.detach()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_no_projector_is_kept(shape: tuple[int, int]) -> None:
    p = weights(shape)
    optimizer = DCTAdamW(grouped(p))
    run(optimizer, p, 2)
    assert state_bytes(optimizer) == 4 * (2 * max(shape) * 2 + 2)


def test_moments_of_vectors_that_stay_do_not_change() -> None:
    p, twin = weights(TALL), weights(TALL)
    ours, frozen = DCTAdamW(grouped(p)), DCTAdamW(grouped(twin, update_proj_gap=100))
    for step in range(4):
        for parameters, optimizer in ((p, ours), (twin, frozen)):
            torch.manual_seed(step)
            # always the same two vectors win
            parameters[0].grad = normal(12, 2, seed=step) @ _two_cosines() + 1e-3 * normal(*TALL, seed=step)
            optimizer.step()
    assert torch.equal(ours.state[p[0]]["exp_avg"], frozen.state[twin[0]]["exp_avg"])
    assert torch.equal(p[0], twin[0])


def _two_cosines() -> torch.Tensor:
    from loratlas.linalg.dct import vectors

    return vectors("dct2", 6, torch.tensor([1, 4]), 0, torch.float32)


@pytest.mark.parametrize(("kind", "error"), [("fp", 1e-6), ("int8", 0.1), ("int4", 1.0)])
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_error_feedback_loses_nothing(shape: tuple[int, int], kind: str, error: float) -> None:
    """The sum of what went into the moments, and the error, is the sum of the gradients."""
    p = weights(shape)
    optimizer = DCTAdamW(grouped(p, moments="keep"), betas=(0.0, 0.0), error_feedback=kind)
    total, applied = torch.zeros(shape), torch.zeros(shape)
    for step in range(6):
        feed(p, step)
        total += p[0].grad
        optimizer.step()
        state = optimizer.state[p[0]]
        group = optimizer.param_groups[0]
        from loratlas.optim.subspace import projector_of

        bases = projector_of(group).bases(state, shape, torch.float32)
        bases.add_back(applied, state["exp_avg"], 1.0)  # with beta1 = 0 the first moment is what was applied
    from loratlas.optim.residual import Feedback

    left = Feedback(kind).with_error(torch.zeros(shape), state)
    assert (applied + left - total).abs().max() < error
    assert left.norm() > 0.3 * total.norm()


def test_quantised_errors_are_small() -> None:
    sizes = {}
    for kind in (None, "fp", "int8", "int4"):
        p = weights((64, 64))
        optimizer = DCTAdamW(grouped(p), error_feedback=kind)
        run(optimizer, p, 1)
        sizes[kind] = state_bytes(optimizer)
    added = {kind: size - sizes[None] for kind, size in sizes.items()}
    rows = 2 * 4 * 64
    assert added == {None: 0, "fp": 4 * 64 * 64, "int8": 64 * 64 + rows, "int4": 32 * 64 + rows}


def least_squares(**options: object) -> float:
    """Mean squared error after 300 steps on minibatches of inputs whose spectrum decays."""
    x = normal(300, 24, seed=1) * torch.logspace(0, -1.5, 24)
    target = normal(32, 24, seed=2)
    weight = nn.Parameter(torch.zeros(32, 24))
    optimizer = DCTAdamW([{"params": [weight], "rank": 4}], lr=0.03, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        batch = x[torch.randint(0, 300, (32,), generator=generator)]
        optimizer.zero_grad()
        (batch @ (weight - target).T).square().mean().backward()
        optimizer.step()
    return float((x @ (weight - target).T).detach().square().mean())


def test_carrying_moments_over_pays() -> None:
    assert least_squares() < 0.7 * least_squares(carry_moments=False)


def test_error_feedback_over_many_steps_warns() -> None:
    with pytest.warns(UserWarning, match=r"over 20 steps .* update_proj_gap <= 5"):
        DCTAdamW(grouped(weights(TALL)), error_feedback="fp", update_proj_gap=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DCTAdamW(grouped(weights(TALL)), error_feedback="fp")


def test_wide_matrices_beyond_max_dim_are_not_projected() -> None:
    model = nn.ModuleDict({"head": nn.Linear(6, 50), "inner": nn.Linear(6, 12)})
    optimizer = DCTAdamWConfig(r=2, max_dim=50).build(model, lr=0.01, weight_decay=0.1)
    found = [(group["param_names"], group["rank"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        (["inner.weight"], 2, 0.1),
        (["head.weight"], None, 0.1),
        (["head.bias", "inner.bias"], None, 0.0),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"basis": "svd"},
        {"error_feedback": "int2"},
        {"select_norm": 0},
        {"evaluation": "slow"},
        {"r": 0},
        {"max_dim": 0},
    ],
)
def test_wrong_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(UserError) as error:
        DCTAdamWConfig(**options)
    assert error.value.field == next(iter(options))
    with pytest.raises(UserError, match="error_feedback must be"):
        DCTAdamW(grouped(weights(TALL)), error_feedback="int2")
