"""The linear op over W + D: the same function and gradients as the two products, in every dtype and under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from loratlas import SaltConfig, SoKAConfig
from loratlas.adapters.salt import Salt
from loratlas.adapters.soka import SoKA
from loratlas.engine.config import AtlasConfig
from loratlas.engine.dense import dense_linear, takes_the_sum

METHODS = {"soka": SoKA, "salt": Salt}
FULL_RANK: dict[str, Callable[[], AtlasConfig]] = {
    "soka": lambda: SoKAConfig(r=3, rank_rule=False, target_modules=["0"]),
    "salt": lambda: SaltConfig(r=2, init_y="normal", target_modules=["0"]),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_value_and_gradients_are_those_of_two_products(dtype: torch.dtype, tolerance: float) -> None:
    weight, bias, g = draw(6, 4, dtype=dtype), draw(6, seed=1, dtype=dtype), draw(2, 5, 6, seed=2, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run(dense: bool) -> list[Tensor]:
        x = draw(2, 5, 4, seed=3, dtype=dtype).requires_grad_()
        delta = draw(6, 4, seed=4, dtype=wide).requires_grad_()
        if dense:
            y = dense_linear(x, weight, bias, delta)
        else:
            y = nn.functional.linear(x.to(wide), weight.to(wide) + delta, bias.to(wide)).to(dtype)
        y.backward(g)
        return [y, x.grad, delta.grad]  # type: ignore[list-item]

    for own, other in zip(run(True), run(False), strict=True):
        assert own.dtype == other.dtype
        assert (own - other).norm() <= tolerance * other.norm()


def test_a_small_update_survives_half_precision_and_autocast() -> None:
    x, weight, delta = draw(5, 4), torch.full((6, 4), 8.0), torch.full((6, 4), 1e-3)
    assert takes_the_sum(x)
    assert not takes_the_sum(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes_the_sum(x)
        assert takes_the_sum(x.double())
        gap = dense_linear(x - x.mean(1, keepdim=True), weight, None, delta * draw(6, 4, seed=1))
    assert gap.dtype == torch.bfloat16
    assert float(gap.abs().max()) > 0.0  # the rows of x meet W with zero, all that is left is the update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FULL_RANK)
def test_methods_give_the_same_either_way(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    method, taken = METHODS[name], []
    whole = method.whole

    def noted(*args: Any) -> Tensor | None:
        taken.append(whole(*args))
        return taken[-1]

    monkeypatch.setattr(method, "whole", noted)
    dense = step(FULL_RANK[name](), dtype)
    assert (taken[0] is not None) == (name == "soka" or dtype == torch.float32)
    monkeypatch.setattr(method, "whole", lambda *_: None)
    thin = step(FULL_RANK[name](), dtype)
    for own, other in zip(dense, thin, strict=True):
        assert (own - other).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * other.norm()


def step(config: AtlasConfig, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of an adapted layer away from its start, for 600 rows."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 32)).to(dtype), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for i, p in enumerate(trained):
        p.data.add_(0.05 * draw(*p.shape, seed=i))
    y = model(draw(600, 24, seed=5, dtype=dtype))
    y.backward(draw(600, 32, seed=6, dtype=dtype))
    return [y.detach(), *(p.grad for p in trained if p.grad is not None)]
