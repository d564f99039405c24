"""DyLoRA: every rank from one adapter, what learns in a step, where the ranks come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from toys import TARGETS, Toy, adamw, goal, inputs, train, trainable, view, views

from loratlas import AtlasLoraConfig, DyLoraConfig, UserError, attach, set_rank
from loratlas.engine.export import export_lora


def adapted(**options: object) -> PeftModel:
    base = Toy()
    torch.manual_seed(1)
    return get_peft_model(base, DyLoraConfig(**{"r": 4, "target_modules": list(TARGETS), **options}))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_rank_is_a_lora_of_its_first_pairs(rank: int, tmp_path: Path) -> None:
    model, x = adapted(), inputs()
    train(model, x, 8)
    model.eval()
    set_rank(model, rank)
    y = model(x)
    plain = get_peft_model(Toy(), AtlasLoraConfig(r=rank, lora_alpha=16, target_modules=list(TARGETS))).eval()
    for ours, theirs in zip(views(model), views(plain), strict=True):
        theirs.A.data.copy_(ours.A[:rank])
        theirs.B.data.copy_(ours.B[:, :rank])
    torch.testing.assert_close(y, plain(x), rtol=1e-6, atol=1e-6)
    report = export_lora(model, tmp_path / "lora", ranks="each")
    assert report.rank == rank
    stock = PeftModel.from_pretrained(Toy(), tmp_path / "lora").eval()
    assert stock.peft_config["default"].r == rank
    torch.testing.assert_close(stock(x), y, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(PeftModel.from_pretrained(Toy(), tmp_path / "own")(x), y)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_what_learns_in_a_step(frozen: bool, strict: bool) -> None:
    model, x = adapted(frozen=frozen, strict_freeze=strict).train(), inputs()
    optimizer = adamw(model, weight_decay=0.1)
    attach(model, optimizer, total_steps=9)
    t, drawn = view(model, "second"), set()
    for _ in range(8):
        rank = int(t.drawn)
        drawn.add(rank)
        learns = [slot == rank - 1 if frozen else slot < rank for slot in range(4)]
        y = model(x)
        (y - goal(y)).square().mean().backward()
        assert (t.B.grad != 0).any(0).tolist() == learns
        before = t.B.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        moved = (t.B.detach() != before).any(0).tolist()
        if strict:
            assert moved == learns
    assert len(drawn) > 1


def test_ranks_are_drawn_from_seed_and_step_and_shared_by_the_layers() -> None:
    sequences = []
    for start in (0, 5):
        model = adapted(r=8, rank_pattern={"first": 3}).train()
        optimizer = adamw(model)
        for t in views(model):
            t.step.fill_(start)
        attach(model, optimizer, total_steps=50)
        seen = []
        for _ in range(20 - start):
            first, second = (int(t.drawn) for t in views(model))
            assert first == min(3, second)
            seen.append(second)
            for p in trainable(model):
                p.grad = torch.zeros_like(p)
            optimizer.step()
        sequences.append(seen)
    assert sequences[0][5:] == sequences[1]
    assert len(set(sequences[0])) >= 5


def test_units_and_small_ranks_first() -> None:
    model = adapted(r=8, unit=2, rank_distribution="geometric", geometric_p=0.7).train()
    optimizer, seen = adamw(model), []
    attach(model, optimizer, total_steps=100)
    for _ in range(60):
        seen.append(int(view(model).drawn))
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert set(seen) <= {2, 4, 6, 8}
    assert seen.count(2) > 30


def test_truncated_it_beats_a_truncated_lora() -> None:
    """The target's spectrum falls: every further pair helps, and the first ones are not an arbitrary half."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 8)).Q for n in (14, 12))
    target = u @ torch.diag(torch.tensor([8.0, 6.0, 4.5, 3.0, 2.0, 1.3, 0.8, 0.5])) @ v.T
    x = torch.randn(256, 12)
    errors: dict[str, list[float]] = {}
    for name, options in {"dylora": {"frozen": False}, "lora": {}}.items():
        torch.manual_seed(2)
        base = nn.Sequential(nn.Linear(12, 14, bias=False))
        cls = DyLoraConfig if name == "dylora" else AtlasLoraConfig
        model = get_peft_model(base, cls(r=8, lora_alpha=8, target_modules=["0"], **options)).train()
        optimizer = torch.optim.AdamW(trainable(model), lr=2e-2, weight_decay=0.0)
        attach(model, optimizer, total_steps=1500)
        wanted = x @ (base[0].weight.detach() + target).T
        for _ in range(1500):
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        t = view(model, "0")
        errors[name] = []
        for rank in range(1, 9):
            scaling = 8 / rank if name == "dylora" else 1.0
            update = scaling * t.B[:, :rank] @ t.A[:rank]
            errors[name].append(float((update - target).norm()))
    assert all(a > b for a, b in zip(errors["dylora"], errors["dylora"][1:], strict=False))
    assert all(a < 0.9 * b for a, b in zip(errors["dylora"][:6], errors["lora"][:6], strict=True))


def test_wrong_ranks_are_refused() -> None:
    model = adapted()
    for rank in (0, 5):
        with pytest.raises(UserError, match="between 1 and r=4"):
            set_rank(model, rank)
    with pytest.raises(UserError, match="no DyLoRA adapter 'other'"):
        set_rank(model, 1, "other")
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge"):
        set_rank(model, 1)
    with pytest.raises(UserError, match="unit"):
        DyLoraConfig(r=4, unit=3)
