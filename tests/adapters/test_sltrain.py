"""SLTrain: the op, the pretraining layer, its place in a model, and what it fits that a low-rank layer cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from toys import TARGETS, Toy, views

from loratlas import SLTrainConfig, UserError
from loratlas.adapters.sltrain import SLTrainLinear, replace_linears, to_dense
from loratlas.engine.sparse_low_rank import dense, draw_support, sparse_low_rank_linear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12, bias=False))
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mlp(self.embed(ids)))


def test_a_support_is_drawn_without_replacement_and_from_its_seed() -> None:
    for count in (1, 30, 119):
        found = draw_support(3, 10, 12, count)
        assert found.dtype == torch.int32
        assert torch.equal(found, found.unique(sorted=True))
        assert len(found) == count
        assert 0 <= int(found[0]) <= int(found[-1]) < 120
        assert torch.equal(found, draw_support(3, 10, 12, count))
    assert not torch.equal(draw_support(3, 10, 12, 30), draw_support(4, 10, 12, 30))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_dense_matrix_and_nothing_dense_is_kept(frozen: bool) -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, up, down, values, bias = draw(2, 5, 30), draw(40, 3), draw(3, 30), draw(36), draw(40)
    support = draw_support(0, 40, 30, 36)
    weight = torch.randn(40, 30, dtype=torch.float64) if frozen else None
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sparse_low_rank_linear(x, up, down, values, support, weight, bias)
    assert all(t is weight or t.numel() < 40 * 30 for t in kept)
    g = torch.randn_like(y)
    plain = dense(up, down, values, support)
    wanted = nn.functional.linear(x, plain if weight is None else plain + weight, bias)
    torch.testing.assert_close(y, wanted)
    leaves = [x, up, down, values, bias]
    for ours, theirs in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_layer_starts_as_its_sparse_part() -> None:
    torch.manual_seed(0)
    layer = SLTrainLinear(64, 48, r=4, density=0.05)
    weight = layer.dense_weight()
    assert int((weight != 0).sum()) == int(0.05 * 64 * 48)
    assert float(weight.abs().max()) <= 64**-0.5
    assert sum(p.numel() for p in layer.parameters()) == 4 * (64 + 48) + int(0.05 * 64 * 48) + 48
    with torch.no_grad():
        layer.B.normal_()
    assert torch.linalg.matrix_rank(layer.dense_weight()) > 4


def test_a_model_is_converted_saved_loaded_and_made_dense(tmp_path: Path) -> None:
    config = SLTrainConfig(r=3, density=0.1, target_modules=["mlp"])
    model, ids = Net(), torch.arange(9)
    assert replace_linears(model, config) == ["mlp.0", "mlp.2"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    support = model.mlp[0].support.clone()
    for _ in range(5):
        nn.functional.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.mlp[0].support, support)
    save_model(model, str(tmp_path / "model.safetensors"))
    again = Net()
    replace_linears(again, SLTrainConfig(r=3, density=0.1, target_modules=["mlp"], seed=5))
    assert not torch.equal(again.mlp[0].support, support)
    load_model(again, str(tmp_path / "model.safetensors"))
    y = model(ids)
    assert torch.equal(again(ids), y)
    assert type(to_dense(again).mlp[0]) is nn.Linear
    torch.testing.assert_close(again(ids), y)


def test_on_a_frozen_base_it_is_an_adapter() -> None:
    config = SLTrainConfig(r=2, density=0.1, target_modules=list(TARGETS))
    first, second = (get_peft_model(Toy(), config) for _ in range(2))
    for one, other in zip(views(first), views(second), strict=True):
        assert torch.equal(one.support, other.support)
    assert not torch.equal(views(first)[0].support[:10], views(first)[1].support[:10])


def test_it_fits_what_a_low_rank_layer_of_its_size_cannot() -> None:
    torch.manual_seed(0)
    n = 32
    spikes = torch.zeros(n * n)
    where = draw_support(7, n, n, 100)
    spikes[where.long()] = torch.randn(100)
    target = torch.randn(n, 2) @ torch.randn(2, n) / 4 + spikes.view(n, n)
    x, errors = torch.randn(512, n), {}
    ours = SLTrainLinear(n, n, r=2, density=0.13, bias=False)
    ours.support[:100], ours.support[100:] = where, draw_support(8, n, n, len(ours.support) - 100)
    low = nn.Sequential(nn.Linear(n, 4, bias=False), nn.Linear(4, n, bias=False))
    for name, layer in {"sltrain": ours, "low rank": low}.items():
        optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-2, weight_decay=0.0)
        for _ in range(500):
            loss = (layer(x) - x @ target.T).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[name] = float(loss), sum(p.numel() for p in layer.parameters())
    assert errors["sltrain"][1] <= errors["low rank"][1] + 8
    assert errors["sltrain"][0] < 0.1 * errors["low rank"][0]


def test_what_cannot_be_is_refused() -> None:
    for density in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match="density"):
            SLTrainConfig(r=2, density=density)
    refused: list[tuple[Any, str]] = [
        ({"target_modules": ["attn"]}, "name no nn.Linear"),
        ({"target_modules": ["head"]}, "shared with embed"),
        ({"target_modules": ["mlp"], "r": 13}, "module mlp.0: SLTrain: r=13"),
    ]
    for options, words in refused:
        with pytest.raises(UserError, match=words):
            replace_linears(Net(), SLTrainConfig(**{"r": 2, **options}))


def test_a_model_is_converted_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 4))
    with pytest.raises(UserError, match="module 1: SLTrain: r=8"):
        replace_linears(model, SLTrainConfig(r=8, target_modules="all-linear"))
    assert type(model[0]) is nn.Linear
