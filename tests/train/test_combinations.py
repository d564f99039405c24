"""Every adapter with every optimizer and every objective, and the parts that need none: two steps, or a reason why not.

The catalogue says what there is, so a new row is tested without a line here.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from toy_parts import ROWS, catalogued
from toys import trainable
from transformers.modeling_outputs import CausalLMOutput

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))
from test_every_method import ADAPTERS, calibrated

from loratlas import UserError, attach
from loratlas.catalog import baselines, find, load_entry, systems
from loratlas.train.recipe import OPTION_MAPS
from loratlas.train.roles import Cast, cast, spelled_out

VOCAB = 32


def slugs(kind: str) -> list[str]:
    toys = [slug for slug, (of, _) in ROWS.items() if of == kind]
    found = (*systems(kind=kind, status="implemented"), *(system for system in baselines() if system.kind == kind))
    return list(dict.fromkeys([*(system.slug for system in found), *toys]))


class Language(nn.Module):
    """A language model with two layers to adapt and a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 12)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 14, bias=False)
        self.layers = nn.ModuleList(nn.Linear(14, 14) for _ in range(3))
        self.head = nn.Linear(14, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        x = self.second(torch.tanh(self.first(self.embed(input_ids))))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(x)
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


BASE = Language()
IDS = torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))


def members(method: str, **parts: str | None) -> Cast:
    """Sizes that fit the toy: rank 2 wherever a part has one."""
    values: dict[str, Any] = {"method": method, **parts}
    for slug in filter(None, (method, *parts.values())):
        system = find(slug)
        if system.kind == "adapter":
            continue
        known = {field.name for field in fields(load_entry(system))}
        values[OPTION_MAPS[system.kind]] = {name: 2 for name in ("r", "rank") if name in known}
    return cast(SimpleNamespace(**spelled_out(values)))


def two_steps(found: Cast) -> str | None:
    """Train a copy of the toy; the reason, where it is refused."""
    refused = next((text for _, text in found.problems()), None)
    if refused:
        return refused
    model: Any = copy.deepcopy(BASE)
    if found.adapter is not None:
        model = get_peft_model(model, calibrated(found.adapter.system.slug, model))
    try:
        found.check(model)
        objective = found.objective and found.objective.part().build(model)
        optimizer = _optimizer(found, model)
        attach(model, optimizer, total_steps=2)
        if found.strategy:
            _begin(found.strategy.part().build(), model, optimizer)
    except UserError as error:
        return str(error)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        loss = _loss(model, objective, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    after = list(model.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return None


def _optimizer(found: Cast, model: nn.Module) -> torch.optim.Optimizer:
    if found.optimizer is None:
        return torch.optim.AdamW(trainable(model), lr=1e-3)
    return found.optimizer.part().build(model, lr=1e-3, weight_decay=0.01)


def _begin(strategy: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if hasattr(strategy, "attach"):
        strategy.attach(model, optimizer, total_steps=2)


def _loss(model: nn.Module, objective: Any, step: int) -> Tensor:
    batch = {"input_ids": IDS, "labels": IDS}
    if objective is None:
        return model(**batch).loss
    objective.at(step, 2)
    rows = torch.arange(len(IDS)) % 2 == 0
    return objective.loss(model, {**batch, **dict.fromkeys(objective.own, rows)})


@pytest.fixture(autouse=True, scope="module")
def toys_in_the_catalogue() -> Iterator[None]:
    with catalogued():
        yield


OPTIMIZERS, OBJECTIVES = [None, *slugs("optimizer")], [None, *slugs("objective")]


@pytest.mark.parametrize("slug", ADAPTERS)
def test_an_adapter_with_every_optimizer_and_objective(slug: str) -> None:
    reasons = {
        (optimizer, objective): two_steps(members(slug, optimizer=optimizer, objective=objective))
        for optimizer, objective in itertools.product(OPTIMIZERS, OBJECTIVES)
    }
    assert all(reason is None or len(reason) > 30 for reason in reasons.values())
    assert reasons[None, None] is None
    if slug == "lora":
        assert not any(reasons.values()), reasons  # everything that there is works on plain LoRA
    # what works with an objective works without
    assert all(reasons[optimizer, None] is None for (optimizer, _), reason in reasons.items() if reason is None)


@pytest.mark.parametrize("slug", [*slugs("optimizer"), *slugs("strategy")])
def test_a_part_that_trains_the_base(slug: str) -> None:
    found = members(slug)
    if not load_entry(find(slug)).trains_base:
        assert found.adapter is not None
        assert two_steps(found) is None
        return
    assert found.adapter is None
    assert two_steps(found) is None
    others = "strategy" if found.optimizer else "optimizer"
    for other in slugs(others):
        reason = two_steps(members(slug, **{others: other}))
        assert (reason is None) != load_entry(find(other)).needs_pairs, (other, reason)
