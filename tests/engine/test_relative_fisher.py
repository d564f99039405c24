"""Relative Fisher information against autograd, its weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratlas import AtlasLoraConfig, LoraGAConfig, UserError, calibrate, relative_fisher
from loratlas.engine.config import AtlasConfig
from loratlas.engine.relative_fisher import row_weights

Batches = list[dict[str, Tensor]]


def batches(seed: int, rows: tuple[int, ...]) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in rows:
        labels = torch.randint(0, 4, (count,), generator=generator)
        labels[0] = -100  # does not count
        made.append({"x": torch.randn(count, 5, generator=generator), "labels": labels})
    return made


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def config() -> AtlasConfig:
    return AtlasLoraConfig(r=2, init_weights="fila", target_modules=["0", "2"])


def by_hand(data: Batches) -> dict[str, Tensor]:
    """sum c g^2 / sum c, by autograd on the whole model."""
    model, total = net(), sum(int((batch["labels"] != -100).sum()) for batch in data)
    found = {path: torch.zeros_like(model.get_submodule(path).weight) for path in ("0", "2")}
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        for path, value in found.items():
            value += model.get_submodule(path).weight.grad ** 2 * int((batch["labels"] != -100).sum()) / total
    return found


def test_it_is_the_ratio_of_two_weighted_means_of_squared_gradients() -> None:
    forget, retain, cfg = batches(1, (3, 6)), batches(2, (5, 2, 7)), config()
    found = relative_fisher(net(), cfg, forget, retain, loss=loss, eps=1e-3)
    assert cfg.calibration is found
    above, below = by_hand(forget), by_hand(retain)
    for path in ("0", "2"):
        torch.testing.assert_close(found[path]["relative_fisher"], above[path] / (1e-3 + below[path]))


def test_samples_one_by_one_and_a_number_of_batches() -> None:
    forget, retain = batches(1, (4, 6)), batches(2, (5, 4))
    for data in (forget, retain):
        for batch in data:
            batch["labels"][0] = 1  # every sample counts
    apart = [
        [
            {name: value[i : i + 1] for name, value in batch.items()}
            for batch in data[:1]
            for i in range(len(batch["x"]))
        ]
        for data in (forget, retain)
    ]
    found = relative_fisher(net(), config(), forget, retain, loss=loss, per_sample=True, steps=1)
    expected = relative_fisher(net(), config(), *apart, loss=loss)
    torch.testing.assert_close(found, expected)
    together = relative_fisher(net(), config(), forget, retain, loss=loss, steps=1)
    assert not torch.allclose(found["0"]["relative_fisher"], together["0"]["relative_fisher"], rtol=0.1)


def test_balanced_rows_weigh_one_in_the_mean() -> None:
    data = batches(1, (3, 6)), batches(2, (5,))
    plain = relative_fisher(net(), config(), *data, loss=loss)["0"]["relative_fisher"]
    found = relative_fisher(net(), config(), *data, loss=loss, balanced=True)["0"]["relative_fisher"]
    assert float(row_weights(found).mean()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(found / found.sum(), plain / plain.sum())


def test_what_is_refused() -> None:
    data = batches(1, (3,))
    empty = [{**data[0], "labels": torch.full((3,), -100)}]
    with pytest.raises(UserError, match="retain set has no label that counts"):
        relative_fisher(net(), config(), data, empty, loss=loss)
    with pytest.raises(UserError, match="forget set has no labels"):
        relative_fisher(net(), config(), [{"x": data[0]["x"]}], data, loss=loss)
    with pytest.raises(UserError, match="no batch"):
        relative_fisher(net(), config(), [], data, loss=loss)
    with pytest.raises(UserError, match="eps must be positive"):
        relative_fisher(net(), config(), data, data, loss=loss, eps=0.0)
    with pytest.raises(UserError, match=r"two data sets: call loratlas.relative_fisher"):
        calibrate(net(), config(), data, loss=loss)
    with pytest.raises(UserError, match="needs no calibration"):
        calibrate(net(), AtlasLoraConfig(target_modules=["0"]), data, loss=loss)
    calibrate(net(), LoraGAConfig(target_modules=["0"]), data, loss=loss)
