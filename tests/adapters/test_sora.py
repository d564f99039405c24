"""SoRA: what the threshold does to gates, stages, the term in the loss, ranks that are found and shipped."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, adamw, goal, inputs, train, trainable, view, views
from transformers import Trainer, TrainingArguments, get_scheduler

from loratlas import LifecycleCallback, SoRAConfig, UserError, attach
from loratlas.analysis.inspect import inspect_adapter
from loratlas.engine.export import export_lora


def config(**options: Any) -> SoRAConfig:
    return SoRAConfig(**{"r": 4, "sparse_lambda": 0.0, "target_modules": list(TARGETS), **options})


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(Toy(), config(**options))


def step_without_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()


OPTIMIZERS = {
    "decoupled": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5),
    "in the gradient": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.5),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gate_that_nothing_pulls_at_shrinks_by_xi_a_step_and_stays_at_0(name: str) -> None:
    """Whatever the optimizer decays: not gates, but the rest, whose groups and state are as without us."""
    model = adapted(xi=0.1, gate_init="ones", init_weights=False)
    optimizer = OPTIMIZERS[name](trainable(model))
    attach(model, optimizer)
    groups = [(group["params"], list(group["params"])) for group in optimizer.param_groups]
    gates, ups = view(model).gates, view(model).B.detach().clone()
    for step in range(1, 13):
        step_without_gradients(model, optimizer)
        expected = torch.full((4,), max(0.0, 1.0 - 0.1 * step))
        torch.testing.assert_close(gates.detach(), expected, rtol=0, atol=1e-6)
    assert gates.count_nonzero() == 0
    assert not torch.equal(view(model).B, ups)
    assert [(group["params"], list(group["params"])) for group in optimizer.param_groups] == groups
    assert all(group["weight_decay"] == 0.5 for group in optimizer.param_groups)


def test_a_step_that_fails_leaves_no_trace() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.5)
    attach(model, optimizer)
    held = list(optimizer.param_groups[0]["params"])

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(fail)  # runs after ours
    with pytest.raises(KeyboardInterrupt):
        step_without_gradients(model, optimizer)
    hook.remove()
    step_without_gradients(model, optimizer)
    assert [group["params"] for group in optimizer.param_groups] == [held]


def test_more_threshold_leaves_fewer_pairs() -> None:
    def left(xi: float) -> int:
        model = adapted(xi=xi, r=8)
        train(model, inputs(), 40)
        return sum(int(t.gates.count_nonzero()) for t in views(model))

    found = [left(xi) for xi in (0.0, 0.01, 0.03, 0.1)]
    assert found[0] == 16
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_without_threshold_and_term_it_is_lora_with_gates() -> None:
    model, plain = adapted(xi=0.0), adapted()
    train(model, inputs(), 8)
    optimizer = adamw(plain)
    for _ in range(8):
        y = plain(inputs())
        (y - goal(y)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trainable(model), trainable(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", [1, 2])
def test_it_finds_the_rank_of_the_target(seed: int) -> None:
    """W + a matrix of rank 2: of eight pairs two or three are left, and they fit it; xi=0 keeps all eight."""

    def fit(xi: float, steps: int) -> tuple[int, float]:
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(16, 16, bias=False))
        change = torch.randn(16, 2) @ torch.randn(2, 16) / 4
        target = base[0].weight.detach() + change
        model = get_peft_model(base, config(r=8, lora_alpha=8, xi=xi, target_modules=["0"]))
        optimizer, x = adamw(model), torch.eye(16)
        attach(model, optimizer)
        for _ in range(steps):
            (model(x).T - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        rest = (model(x).T - target).detach().norm() / change.norm()
        return int(view(model, "0").gates.count_nonzero()), float(rest)

    rank, rest = fit(8e-3, 1500)
    assert 2 <= rank <= 3
    assert rest < 0.01
    assert fit(0.0, 200)[0] == 8


# ------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("first", [None, 0.5])
def test_the_threshold_rises_from_stage_to_stage(first: float | None) -> None:
    options = {"xi": 0.0, "xi_max": 0.1, "stages": 3, "first_stage": first, "gate_init": "ones"}
    model = adapted(xi_schedule="linear", **options)
    optimizer, seen = torch.optim.SGD(trainable(model), lr=0.1), [1.0]
    attach(model, optimizer, total_steps=12)
    for _ in range(12):
        step_without_gradients(model, optimizer)
        seen.append(float(view(model).gates[0].detach()))
    taken = [round(before - after, 3) for before, after in itertools.pairwise(seen)]
    lengths = (4, 4, 4) if first is None else (6, 3, 3)
    assert taken == [0.0] * lengths[0] + [0.05] * lengths[1] + [0.1] * lengths[2]


RATES = {"restart": [4, 3, 2, 1] * 2, "official": [4, 3, 2, 1, 0, 0, 0, 0], "run": [4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5]}


@pytest.mark.parametrize("rule", RATES)
def test_what_stages_do_to_the_learning_rate(rule: str) -> None:
    model = adapted(xi_schedule=[0.0, 0.01], stage_lr=rule)
    optimizer = adamw(model, lr=4.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=8)
    attach(model, optimizer, total_steps=8, scheduler=scheduler)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        step_without_gradients(model, optimizer)
        scheduler.step()
    assert rates == pytest.approx(RATES[rule])


def test_stages_need_the_number_of_steps() -> None:
    model = adapted(xi_schedule="linear", xi=0.0)
    with pytest.raises(UserError, match="total_steps=N"):
        attach(model, adamw(model))


# ----------------------------------------------------------------------------------------------------- term in the loss


class WithLoss(Toy):
    """As transformers' models are: the loss is part of the output."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"loss": y.square().mean(), "logits": y}


def test_the_term_is_the_mean_over_all_gates(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(WithLoss(), config(sparse_lambda=10.0))
    task = float(model(inputs())["loss"].detach())
    optimizer = adamw(model)
    lifecycle = attach(model, optimizer)
    gates = torch.cat([t.gates.detach() for t in views(model)])
    loss = model(inputs())["loss"]
    assert float(loss.detach()) == pytest.approx(task + 10.0 * float(gates.abs().mean()))
    assert float(lifecycle.terms().detach()) == pytest.approx(10.0 * float(gates.abs().mean()))
    loss.backward()
    optimizer.step()
    assert caplog.text == ""


def test_a_trainer_has_the_term_and_the_stages(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(WithLoss(), config(sparse_lambda=10.0, xi_schedule=[0.0, 0.5], gate_init="ones"))
    rows = [{"x": row} for row in inputs()]
    plan = {"max_steps": 8, "per_device_train_batch_size": 6, "learning_rate": 4e-3, "logging_steps": 1}
    quiet = {"report_to": "none", "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **plan, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[LifecycleCallback()])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["learning_rate"] for row in logs] == pytest.approx([rate * 1e-3 for rate in RATES["restart"]])
    assert logs[0]["loss"] == pytest.approx(10.0 + float(Toy()(inputs()).square().mean().detach()), rel=1e-3)
    assert all(int(t.gates.count_nonzero()) == 0 for t in views(model))


def test_a_loop_with_a_loss_of_its_own_is_told(caplog: pytest.LogCaptureFixture) -> None:
    train(adapted(sparse_lambda=1.0), inputs(), 3)
    assert caplog.text.count("sora adds a term to the loss, but this loop computes a loss of its own") == 1


# ------------------------------------------------------------------------------------------------- what is left of it


def pruned() -> PeftModel:
    model = adapted(r=8, xi=0.02)
    train(model, inputs(), 40)
    assert {0, 8}.isdisjoint(int(t.gates.count_nonzero()) for t in views(model))
    return model


def test_dead_pairs_are_not_exported(tmp_path: Path) -> None:
    model = pruned()
    ranks = [int(t.gates.count_nonzero()) for t in views(model)]
    report = export_lora(model, tmp_path / "lora")
    assert (report.exact_rank, report.rank, report.relative_error) == (max(ranks), max(ranks), 0.0)
    stock = PeftModel.from_pretrained(Toy(), tmp_path / "lora")
    torch.testing.assert_close(stock(inputs()), model(inputs()), rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "own")
    layers = inspect_adapter(tmp_path / "own").layers
    assert [len(layer.singular_values or ()) for layer in layers] == ranks


def test_a_layer_may_be_switched_off_altogether(tmp_path: Path) -> None:
    model = adapted()
    train(model, inputs(), 5)
    view(model, "second").gates.data.zero_()
    export_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(Toy(), tmp_path)
    torch.testing.assert_close(stock(inputs()), model(inputs()), rtol=1e-6, atol=1e-6)


def test_the_ranks_over_time_are_written_down() -> None:
    model = adapted(r=8, xi=0.02)
    counts = [8]
    train(model, inputs(), 40, each=lambda step: counts.append(int(view(model).gates.count_nonzero())))
    log = view(model).rank_log.tolist()
    assert log[0] == [0, 8]
    assert all(counts[step] == rank for step, rank in log)
    assert len({rank for _, rank in log}) > 2
    assert log[-1][1] == counts[-1]


@pytest.mark.parametrize("stop_at", [5, 8])
def test_resume_is_exact(stop_at: int, tmp_path: Path) -> None:
    x, steps = inputs(), 14
    options = {"xi_schedule": [0.01, 0.1]}
    whole = adapted(**options)
    train(whole, x, steps, optimizer=adamw(whole, weight_decay=0.1))

    first = adapted(**options)
    optimizer = adamw(first, weight_decay=0.1)
    train(first, x, stop_at, total=steps, optimizer=optimizer)
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    second = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    optimizer = adamw(second, weight_decay=0.1)
    optimizer.load_state_dict(state)
    train(second, x, steps - stop_at, total=steps, optimizer=optimizer)
    for ours, theirs in zip(views(second), views(whole), strict=True):
        for name in ("A", "B", "gates", "rank_log"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert any(int(t.gates.count_nonzero()) < 4 for t in views(whole))


def test_a_saved_module_that_is_called_like_a_tensor_of_ours_is_refused() -> None:
    """PEFT would wrap both."""
    with pytest.raises(
        UserError, match=r"modules_to_save: 'gates' is also how a tensor of sora is called.*'mlp.gates'"
    ):
        get_peft_model(Toy(), config(modules_to_save=["gates"]))


def test_bad_options() -> None:
    for message, options in {
        "xi must be at least 0": {"xi": -1.0},
        "threshold must be 'prox' or 'official'": {"threshold": "hard"},
        "gate_init must be": {"gate_init": "zeros"},
        "xi_schedule must be one of linear, log_linear, exp_linear": {"xi_schedule": "cosine"},
        "xi_schedule must be a list of thresholds": {"xi_schedule": [0.1, -0.1]},
        "xi must be above 0 with 'exp_linear'": {"xi_schedule": "exp_linear", "xi": 0.0},
        "xi must be at most xi_max=0.0007": {"xi_schedule": "linear"},
        "first_stage must be between 0 and 1": {"first_stage": 1.0},
        "stage_lr must be 'restart', 'official' or 'run'": {"stage_lr": "once"},
    }.items():
        with pytest.raises(UserError, match=message):
            config(**options)
