"""BA-LoRA's objective: its teacher, what a weight of zero saves, the schedule's clock, masks, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from language import VOCAB, adapted, batch, llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from toys import adamw, trainable

from loratlas import AtlasLoraConfig, BALoraConfig, UserError
from loratlas.objectives.ba_lora import BALora
from loratlas.objectives.teacher import disabled

STEADY: dict[str, Any] = {"lambda1_schedule": "constant", "focus_schedule": "constant"}


def move(model: nn.Module) -> None:
    """Away from the start, where teacher and student are one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_at_the_start_teacher_and_student_are_one_whatever_the_start(init: Any) -> None:
    model = adapted(init)
    objective = BALoraConfig(lambda1=1.0, lambda2=0.0, lambda3=0.0, **STEADY).build(model)
    inputs = batch()
    plain = model(**inputs).loss
    loss = objective.loss(model, inputs)
    assert abs(float(objective.terms["consistency"])) < 1e-6
    grads = [torch.autograd.grad(value, trainable(model), retain_graph=True) for value in (loss, plain)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_the_base_model_and_leaves_the_student_as_it_was() -> None:
    model, base = adapted("pissa", lora_dropout=0.5).train(), llama().eval()
    move(model)
    frozen = trainable(model)[0].requires_grad_(False)  # as by a method that has finished with it
    model.base_model.model.lm_head.eval()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    inputs = batch()
    state = torch.random.get_rng_state()
    objective = BALoraConfig(lambda2=0.0, lambda3=0.0, **STEADY).build(model)
    student = model(**inputs)
    between = torch.random.get_rng_state()
    objective(model, inputs, student).backward()
    assert torch.equal(torch.random.get_rng_state(), between)
    assert not torch.equal(state, between)
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert frozen.grad is None
    with disabled(model), torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


def test_a_given_teacher_teaches_instead() -> None:
    model, other = adapted(), llama(seed=3).train()
    inputs = batch()
    objective = BALoraConfig(lambda1=0.5, lambda2=0.0, lambda3=0.0, temperature=3.0, **STEADY).build(model, other)
    outputs = model(**inputs)
    loss = objective(model, inputs, outputs)
    mask = inputs["labels"] != -100
    p, z = (t.detach().div(3.0).log_softmax(-1)[mask] for t in (other(**inputs).logits, outputs.logits))
    kl = 9.0 * (p.exp() * (p - z)).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), outputs.loss.detach() + 0.5 * kl)
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())
    full = BALoraConfig(lambda2=0.0, lambda3=0.0, **STEADY).build(llama(), other)  # without any adapter
    assert full.loss(llama(), inputs) > 0


def test_without_weights_the_loss_is_the_models_own_and_nobody_teaches() -> None:
    model, inputs = adapted(), batch()
    objective = BALoraConfig(lambda1=0.0, lambda2=0.0, lambda3=0.0).build(model)
    outputs = model(**inputs)
    calls = count_forwards(model)
    assert objective(model, inputs, outputs) is outputs.loss
    assert calls == []
    BALoraConfig(lambda1=0.0, **STEADY).build(model)(model, inputs, outputs)
    assert calls == []
    BALoraConfig(**STEADY).build(model)(model, inputs, outputs)
    assert len(calls) == 1


def test_terms_wait_for_their_step_and_a_resumed_run_needs_only_the_step() -> None:
    model, inputs = adapted(), batch()
    move(model)
    outputs = model(**inputs)
    config = BALoraConfig()
    objective, losses = config.build(model), []
    for step in range(20):
        objective.at(step, 20)
        losses.append(objective(model, inputs, outputs).item())
        assert ("svd" in objective.terms) == ("diversity" in objective.terms) == (step > 4)
    later = config.build(model)
    later.at(13, 20)
    assert later(model, inputs, outputs).item() == losses[13]
    assert later.weights == pytest.approx((0.025 * (0.1 + 0.45 * (1 + math.cos(math.pi * 0.65))), 0.005, 0.005))


def test_only_labelled_tokens_have_gradients_of_the_terms() -> None:
    inputs = batch()
    logits = torch.randn(3, 8, VOCAB, requires_grad=True)
    teacher = torch.randn(3, 8, VOCAB)
    for shift in (False, True):
        config = BALoraConfig(shift_mask=shift, **STEADY)
        objective = BALora(config, lambda model, inputs, like: teacher)  # type: ignore[arg-type]
        loss = objective(nn.Identity(), inputs, SimpleNamespace(loss=torch.zeros(()), logits=logits))
        (grad,) = torch.autograd.grad(loss, logits)
        expected = inputs["labels"] != -100
        if shift:
            expected = expected.roll(-1, dims=1)
        assert torch.equal(grad.abs().sum(-1) > 0, expected)


def test_the_adaptive_weight_follows_the_teachers_confidence() -> None:
    model, inputs = adapted(), batch()
    objective = BALoraConfig(lambda1=0.4, adaptive=True, lambda1_min=0.1, lambda1_max=0.3, lambda2=0, lambda3=0).build(
        model
    )
    objective.loss(model, inputs)  # needs no step
    assert 0.1 < objective.weights[0] < 0.3


def test_classification_takes_its_own_terms_by_the_shape_of_the_logits() -> None:
    z = torch.randn(6, 4, requires_grad=True)
    teacher = torch.randn(6, 4)
    objective = BALora(BALoraConfig(**STEADY), lambda model, inputs, like: teacher)  # type: ignore[arg-type]
    loss = objective(nn.Identity(), {}, SimpleNamespace(loss=torch.zeros(()), logits=z))
    sigma, centred = torch.linalg.svdvals(z.detach()), z.detach() - z.detach().mean(0)
    c = (centred.T @ centred / 5).square()
    expected = 0.15 * 4 * F.kl_div((z.detach() / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    expected += 0.03 * (c.sum() - c.diagonal().sum()) / 4 - 0.03 * sigma[:5].sum() / sigma.sum()
    torch.testing.assert_close(loss.detach(), expected)
    alone = objective(nn.Identity(), {}, SimpleNamespace(loss=torch.zeros(()), logits=z[:1].detach()))
    assert torch.isfinite(alone)


def test_minorities_survive_unbalanced_data_better_with_it() -> None:
    """A model that knows three classes is trained on data in which the third hardly occurs."""
    recalls = {name: minority_recall(weights) for name, weights in (("plain", (0, 0, 0)), ("ba", (1.0, 0.03, 0.03)))}
    assert recalls["plain"] < 0.6
    assert recalls["ba"] > recalls["plain"] + 0.1


def minority_recall(weights: tuple[float, float, float]) -> float:
    torch.manual_seed(0)
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    net = Classifier()
    x, y = samples(centres, [200, 200, 200])
    fit(net, adamw(net), lambda: net(x, y).loss)
    model = get_peft_model(net, AtlasLoraConfig(r=2, target_modules=["first", "second"]))
    x, y = samples(centres, [200, 200, 3])
    config = BALoraConfig(lambda1=weights[0], lambda2=weights[1], lambda3=weights[2], svd_k=1, **STEADY)
    objective = config.build(model)
    fit(model, adamw(model), lambda: objective.loss(model, {"x": x, "labels": y}))
    x, y = samples(centres, [0, 0, 400])
    return float((model(x, y).logits.argmax(1) == y).float().mean())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def samples(centres: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    return centres[y] + 0.6 * torch.randn(len(y), 2), y


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any) -> None:
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def count_forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "qa"}, "task must be None, 'nlg' or 'nlu'"),
        ({"variant": "v2"}, "variant must be 'v6' or 'v1'"),
        ({"lambda2": -0.1}, "lambda2 must be at least 0"),
        ({"svd_k": 0}, "svd_k must be at least 1"),
        ({"svd_norm": "max"}, "svd_norm must be 'fro' or 'sum'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"lambda1_schedule": "two_phase"}, "lambda1_schedule must be one of constant, cosine"),
        ({"focus_schedule": "cosine"}, "focus_schedule must be one of constant, two_phase"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\]"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BALoraConfig(**options)


def test_models_without_a_teacher_in_them_are_refused() -> None:
    with pytest.raises(UserError, match=r"a LlamaForCausalLM without an adapter does not keep.*teacher"):
        BALoraConfig().check(llama())
    moved = get_peft_model(llama(), LoraConfig(init_lora_weights="pissa", r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"start 'pissa' of adapter 'default' has rewritten the base weights"):
        BALoraConfig().build(moved)
    BALoraConfig(lambda1=0.0).check(llama())
    BALoraConfig().build(moved, teacher=llama())


def test_bad_batches_get_one_sentence() -> None:
    model, inputs = adapted(), batch()
    objective = BALoraConfig(**STEADY).build(model)
    outputs = model(**inputs)
    nothing = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    with pytest.raises(UserError, match="no token of a batch has a label, all are -100"):
        objective(model, nothing, outputs)
    with pytest.raises(UserError, match="give every batch its labels"):
        objective(model, {name: value for name, value in inputs.items() if name != "labels"}, outputs)
    with pytest.raises(UserError, match="must return a loss and logits"):
        objective(model, inputs, SimpleNamespace(loss=None, logits=outputs.logits))
    with pytest.raises(UserError, match=r"objective.at\(step, total\)"):
        BALoraConfig().build(model)(model, inputs, outputs)
    with pytest.raises(UserError, match=r"task='nlu' needs logits of shape \(samples, classes\)"):
        BALoraConfig(task="nlu", **STEADY).build(model)(model, inputs, outputs)
    with pytest.raises(UserError, match=r"teacher's logits are \(3, 8, 29\), the model's \(3, 8, 23\)"):
        BALoraConfig(**STEADY).build(model, llama(vocab=29))(model, inputs, outputs)
