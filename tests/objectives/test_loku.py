"""LoKU: the inverted hinge loss, batches of two sets, and a small model that forgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from language import VOCAB, batch, llama
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from toys import adamw

from loratlas import AtlasLoraConfig, LoKUConfig, UserError, relative_fisher
from loratlas.objectives.loku import ascent, inverted_hinge


def one(row: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Logits (1, 2, V) and labels whose only counting label is predicted by `row`."""
    return torch.stack((row, row * 0))[None], torch.tensor([[-100, target]])


def test_its_range_its_middle_and_its_gradient() -> None:
    z = torch.randn(9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = inverted_hinge(*one(z, 4))
    p = z.detach().softmax(0)
    others = p.clone()
    others[4] = 0
    runner = int(others.argmax())
    torch.testing.assert_close(loss.detach(), 1 + p[4] - p[runner])
    eye = torch.eye(9)
    expected = p[4] * (eye[4] - p) - p[runner] * (eye[runner] - p)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, expected)
    assert abs(float(grad.sum())) < 1e-6
    certain, forgotten = 50 * eye[4], 50 * eye[3]
    assert [float(inverted_hinge(*one(row, 4))) for row in (certain, forgotten, eye[4] + eye[3])] == [2.0, 0.0, 1.0]


def test_it_stops_where_gradient_ascent_goes_on() -> None:
    z = (20 * torch.eye(9)[3]).requires_grad_()
    hinge, up = (torch.autograd.grad(loss(*one(z, 4)), z)[0] for loss in (inverted_hinge, ascent))
    assert hinge.abs().max() < 1e-6
    assert up.abs().max() > 0.9


def test_descent_lowers_the_target_and_raises_the_runner_up() -> None:
    z = torch.tensor([1.0, 2.0, 0.5, 3.0]).requires_grad_()
    (grad,) = torch.autograd.grad(inverted_hinge(*one(z, 3)), z)
    before, after = z.detach().softmax(0), (z.detach() - grad).softmax(0)
    assert after[3] < before[3]
    assert after[1] > before[1]


def test_a_smaller_margin_lets_forgotten_tokens_be() -> None:
    z = torch.tensor([0.0, 3.0, 0.0]).requires_grad_()
    loss = inverted_hinge(*one(z, 0), margin=0.5)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize(("name", "sign"), [("ihl", 0), ("ascent", -1)])
def test_one_forward_of_both_sets_is_two_of_each(name: str, sign: int) -> None:
    model = llama()
    forget, retain = batch(seed=1), batch(seed=2)
    objective = LoKUConfig(forget_loss=name, retain_weight=0.7).build(model)
    both = {key: torch.cat((forget[key], retain[key])) for key in forget}
    loss = objective.loss(model, {**both, "forget": torch.tensor([True] * 3 + [False] * 3)})
    alone, kept = model(**forget), model(**retain)
    first = sign * alone.loss if sign else inverted_hinge(alone.logits, forget["labels"])
    torch.testing.assert_close(loss, first + 0.7 * kept.loss)
    torch.testing.assert_close(objective.terms["retain"], kept.loss.detach())


def test_gradient_ascent_needs_no_retain_set() -> None:
    model, inputs = llama(), batch()
    loss = (
        LoKUConfig(forget_loss="ascent", retain_weight=0).build(model).loss(model, {**inputs, "forget": torch.ones(3)})
    )
    torch.testing.assert_close(loss, -model(**inputs).loss)


def test_bad_batches_and_options_get_one_sentence() -> None:
    model, inputs = llama(), batch()
    objective = LoKUConfig().build(model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "does not say which rows to forget.*PairCollator"),
        ({"forget": torch.zeros(3)}, "no row to forget"),
        ({"forget": torch.ones(3)}, "no row to retain.*retain_weight=0"),
        ({"forget": torch.tensor([1, 0, 0]), "labels": None}, "give every batch its labels"),
    ]
    for extra, message in cases:
        with pytest.raises(UserError, match=message):
            objective(model, {**inputs, **extra}, model(**inputs))
    unlabelled = {**inputs, "labels": inputs["labels"].clone(), "forget": torch.tensor([1, 0, 0])}
    unlabelled["labels"][0] = -100
    with pytest.raises(UserError, match="no token of a batch has a label"):
        objective(model, unlabelled, model(**inputs))
    with pytest.raises(UserError, match="two or more"):
        inverted_hinge(torch.zeros(1, 3, 1), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(UserError, match=r"logits of shape .* but they are \(3, 23\)"):
        inverted_hinge(torch.zeros(3, VOCAB), torch.zeros(3, dtype=torch.long))
    for options, message in (({"forget_loss": "npo"}, "forget_loss must be"), ({"margin": 0.0}, "margin must be")):
        with pytest.raises(UserError, match=message):
            LoKUConfig(**options)


# ------------------------------------------------- the sheet's toy: 12 of 72 memorised points are to be forgotten


class Memory(nn.Module):
    """A softmax over 40 classes that knows 72 points by heart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def as_text(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points as texts of two tokens, of which the second is predicted."""
    labels = torch.stack((torch.full_like(y, -100), y), dim=1)
    return torch.stack((logits, logits), dim=1), labels


@pytest.fixture(scope="module")
def memory() -> tuple[Memory, Tensor, Tensor]:
    model = Memory()
    x, y = torch.randn(72, 24), torch.randint(0, 40, (72,))
    optimizer = adamw(model)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert bool((model(x).argmax(1) == y).all())
    return model, x, y


def unlearn(
    memory: tuple[Memory, Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor], init: Any
) -> dict[int, Tensor]:
    """(accuracy on what to forget, cross entropy and accuracy on the rest) after 10, 30 and 60 steps."""
    known, x, y = memory
    model = Memory()
    model.load_state_dict(known.state_dict())
    config = AtlasLoraConfig(r=3, lora_alpha=6, init_weights=init, target_modules=["first", "second"])
    if init == "fila":
        halves = [[{"x": x[part], "labels": y[part]}] for part in (slice(0, 12), slice(12, 72))]
        relative_fisher(
            model, config, *halves, loss=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["labels"])
        )
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    optimizer, found = adamw(model), {}
    for step in range(1, 61):
        optimizer.zero_grad()
        z = model(x)
        (loss(*as_text(z[:12], y[:12])) + F.cross_entropy(z[12:], y[12:])).backward()
        optimizer.step()
        if step in (10, 30, 60):
            z = model(x).detach()
            right = (z.argmax(1) == y).float()
            found[step] = torch.stack((right[:12].mean(), F.cross_entropy(z[12:], y[12:]), right[12:].mean()))
    return found


def test_the_hinge_keeps_what_gradient_ascent_destroys_and_fila_forgets_sooner(memory: Any) -> None:
    hinge, up = unlearn(memory, inverted_hinge, True), unlearn(memory, ascent, True)
    assert hinge[60][1] < 0.2 * up[60][1]
    assert hinge[60][2] == 1.0
    assert hinge[60][0] < 0.7
    sooner = unlearn(memory, inverted_hinge, "fila")
    assert sooner[10][0] < hinge[10][0]
    assert sooner[60][2] == 1.0
