"""A state that was saved goes on to the bit, and belongs to the subspace it was made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steps import run, same_state, weights
from torch import nn
from torch.optim import Optimizer

from loratlas import UserError, load_checkpoint, save_checkpoint
from loratlas.optim.dct_adamw import DCTAdamW, DCTAdamWConfig
from loratlas.optim.fira import FiraAdamW, FiraRMSProp
from loratlas.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

SHAPES = (128, 64), (64, 128), (64,)
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "galore": GaLoreAdamW,
    "galore-lowrank": lambda groups: GaLoreAdamW(groups, svd_method="lowrank"),
    "galore-full-dct": lambda groups: GaLoreAdamW(groups, proj_type="full", basis="dct3", moments="permute"),
    "galore-reset": lambda groups: GaLoreAdamW(groups, moments="reset"),
    "adafactor": lambda groups: GaLoreAdafactor(groups, beta1=0.9),
    "8bit": GaLoreAdamW8bit,
    "weight-dtype": lambda groups: GaLoreAdamW(groups, state_dtype="weight"),
    "fira": FiraAdamW,
    "fira-rmsprop": lambda groups: FiraRMSProp(groups, momentum=0.5, centered=True),
    "dct": DCTAdamW,
    "dct-int8": lambda groups: DCTAdamW(groups, error_feedback="int8"),
    "dct-int4": lambda groups: DCTAdamW(groups, error_feedback="int4", basis="random"),
}


def made(maker: Callable[..., Optimizer], dtype: torch.dtype) -> tuple[list[nn.Parameter], Optimizer]:
    parameters = weights(*SHAPES, dtype=dtype)
    groups: list[dict[str, Any]] = [{"params": parameters[:2], "rank": 40, "update_proj_gap": 3}]
    return parameters, maker([*groups, {"params": parameters[2:]}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_resumed_is_uninterrupted(name: str, dtype: torch.dtype) -> None:
    if name == "8bit":
        pytest.importorskip("torchao")
    whole, optimizer = made(MAKERS[name], dtype)
    run(optimizer, whole, 8)
    first, before = made(MAKERS[name], dtype)
    run(before, first, 4)
    second, after = made(MAKERS[name], dtype)
    for p, saved in zip(second, first, strict=True):
        p.data.copy_(saved.data)
    after.load_state_dict(before.state_dict())
    assert same_state(before, after)
    run(after, second, 4, first=4)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert same_state(optimizer, after)
    assert all(p.isfinite().all() for p in whole)
    assert not any(torch.equal(p, start) for p, start in zip(whole, weights(*SHAPES, dtype=dtype), strict=True))


def test_a_checkpoint_holds_it(tmp_path: Path) -> None:
    """Plain tensors and numbers: the library's checkpoints store it without pickles."""
    models = [get_peft_model(nn.Sequential(nn.Linear(8, 12)), LoraConfig(r=4, target_modules=["0"])) for _ in range(2)]
    one, other = (DCTAdamWConfig(r=2, error_feedback="int4").build(model, lr=0.01) for model in models)
    run(one, [p for p in models[0].parameters() if p.requires_grad], 3)
    load_checkpoint(save_checkpoint(tmp_path, models[0], one, step=3), models[1], other)
    assert same_state(one, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 3}, "rank=2, this optimizer has 3"),
        ({"basis": "dct2"}, "basis='svd', this optimizer has 'dct2'"),
        ({"proj_type": "left"}, "proj_type='std', this optimizer has 'left'"),
    ],
)
def test_another_subspace_is_refused(changed: dict[str, Any], message: str) -> None:
    p, twin = weights((8, 6)), weights((8, 6))
    saved = GaLoreAdamW([{"params": p, "rank": 2}])
    run(saved, p, 1)
    other = GaLoreAdamW([{"params": twin, "rank": 2, **changed}])
    with pytest.raises(UserError, match=f"group 0 was saved with {message}: build it as before"):
        other.load_state_dict(saved.state_dict())
    assert not other.state
