"""Block-LoRA beyond the golden vectors: equal blocks, the LoRA that it is, and the other reading of the abstract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from toys import TARGETS, Toy, adamw, goal, inputs, train, view, views

from loratlas import AtlasLoraConfig, BlockLoraConfig, UserError
from loratlas.engine.export import export_lora

N, R = 4, 8


def block_lora(seed: int = 1, **options: object) -> PeftModel:
    options = {"r": R, "n_blocks": N, "target_modules": list(TARGETS), **options}
    torch.manual_seed(seed)
    return get_peft_model(Toy(dtype=torch.float64), BlockLoraConfig(**options))


def test_the_blocks_stay_equal_and_the_rank_is_that_of_one() -> None:
    model, x = block_lora(), inputs(dtype=torch.float64)
    train(model, x, optimizer=adamw(model, weight_decay=0.1))
    for t in views(model):
        assert t.B.abs().max() > 0
        assert all(torch.equal(t.B[0], other) for other in t.B[1:])
        assert torch.linalg.matrix_rank(t.layer.method.delta_weight(t)) == R // N
    per_layer = [R * n_out + R // N * n_in for n_out, n_in in ((16, 12), (14, 16))]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(per_layer)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_one_tensor_for_all_blocks_trains_as_the_blocks_do(optimizer: type[torch.optim.Optimizer]) -> None:
    x, models = inputs(dtype=torch.float64), [block_lora(), block_lora(efficient=True)]
    for model in models:
        trained = [p for p in model.parameters() if p.requires_grad]
        train(model, x, steps=20, optimizer=optimizer(trained, lr=1e-2, weight_decay=0.1))
    literal, single = models
    torch.testing.assert_close(single(x), literal(x), rtol=1e-12, atol=1e-12)
    for one, many in zip(views(single), views(literal), strict=True):
        torch.testing.assert_close(one.B, many.B[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.A, many.A, rtol=1e-12, atol=1e-12)


def test_it_is_a_lora_of_rank_r_over_n_with_a_faster_b() -> None:
    x, ours = inputs(dtype=torch.float64), block_lora()
    plain = AtlasLoraConfig(r=R // N, lora_alpha=R // N / R**0.5, target_modules=list(TARGETS))
    theirs = get_peft_model(Toy(dtype=torch.float64), plain)
    for t, u in zip(views(ours), views(theirs), strict=True):
        with torch.no_grad():
            u.A.copy_(t.A)
    # decoupled decay multiplies by 1 - lr weight_decay, so n times the rate asks for an n-th of the decay
    groups = [
        {"params": [t.A for t in views(theirs)]},
        {"params": [t.B for t in views(theirs)], "lr": N * 1e-3, "weight_decay": 0.1 / N},
    ]
    train(theirs, x, optimizer=torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, eps=1e-30))
    train(ours, x, optimizer=adamw(ours, lr=1e-3, weight_decay=0.1, eps=1e-30))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"efficient": True}, {"share": "input", "r": 2}])
def test_exports_at_the_rank_that_it_has(options: dict[str, object], tmp_path: Path) -> None:
    model, x = block_lora(**options), inputs(dtype=torch.float64)
    train(model, x)
    report = export_lora(model, tmp_path / "lora", dtype=torch.float64)
    assert (report.rank, report.relative_error) == (2, 0.0)
    stock = PeftModel.from_pretrained(Toy(dtype=torch.float64), tmp_path / "lora", autocast_adapter_dtype=False)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-6, atol=1e-6)


def test_shared_along_the_input_it_sums_shards_before_a() -> None:
    model, x = block_lora(share="input", r=3), inputs(dtype=torch.float64)
    train(model, x)
    t = view(model)
    assert (t.A.shape, t.B.shape) == ((3, 3), (16, 3))
    expected: Tensor = x.view(6, N, 3).sum(1) @ t.A.T @ t.B.T / 3**0.5
    torch.testing.assert_close(t.layer.method.delta(t, x), expected)
    y = model(x)
    assert float((y - goal(y)).square().mean()) < float((Toy(dtype=torch.float64)(x) - goal(y)).square().mean())


def test_bad_input_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^BlockLoraConfig: r must be a multiple of n_blocks=4, such as 8, but it is 7"
    ):
        BlockLoraConfig(r=7, n_blocks=4)
    with pytest.raises(UserError, match=r"^module first: its rank r=6 does not divide into n_blocks=4: take r=8"):
        block_lora(rank_pattern={"first": 6})
    with pytest.raises(UserError, match=r"^module first: n_blocks=5 does not divide its 12 inputs: take 6 "):
        block_lora(n_blocks=5, share="input")
    for field, value in {"n_blocks": 0, "share": "output"}.items():
        with pytest.raises(UserError, match=f"^BlockLoraConfig: {field} must be "):
            BlockLoraConfig(**{field: value})
    with pytest.raises(UserError, match=r"^BlockLoraConfig: efficient must be False with share='input'"):
        BlockLoraConfig(share="input", efficient=True)
