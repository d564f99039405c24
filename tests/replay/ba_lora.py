"""Replays BA-LoRA's golden vectors: every term with its gradient, the weighted sum and the schedules."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor

from loratlas.objectives import regularisers
from loratlas.objectives.ba_lora import FORMS, BALora, BALoraConfig
from loratlas.objectives.tokens import labelled

TERMS = ("consistency", "diversity", "svd")
BASE = {"a": (0.025, 0.005, 0.005), "b": (0.15, 0.03, 0.03)}  # of the schedules, by the case's letter


def replay(path: Path) -> None:
    golden = load_file(path)
    for task in ("nlu", "nlg"):
        first_code(task, {name.split(".", 1)[1]: t for name, t in golden.items() if name.startswith(f"old_{task}.")})
    new_code({name.split(".", 1)[1]: t for name, t in golden.items() if name.startswith("new.")})
    for name, rows in golden.items():
        if name.startswith("new.schedule"):
            schedule(name, rows, BASE[path.stem.split("_")[1]])


def first_code(task: str, golden: dict[str, Tensor]) -> None:
    z, p, k = golden["ft"], golden["pre"], int(golden["k"])
    cfg = BALoraConfig(task=task, variant="v1", svd_k=k)
    form, settings = FORMS[task, "v1"], cfg.settings(task)
    made = (
        lambda x: form.consistency(x, p, cfg),
        lambda x: form.diversity(x, settings),
        lambda x: form.energy(x, settings),
    )
    for name, term in zip(TERMS, made, strict=True):
        check(f"old_{task}.{name}", term, z, golden[name], golden[f"{name}.grad"])
    lambdas = dict(zip(("lambda1", "lambda2", "lambda3"), golden["lambdas"].tolist(), strict=True))
    objective = BALora(BALoraConfig(task=task, variant="v1", svd_k=k, **lambdas), lambda model, inputs, like: p)
    whole = lambda x: objective(torch.nn.Identity(), {}, SimpleNamespace(loss=torch.zeros(()), logits=x))  # noqa: E731
    check(f"old_{task}.all", whole, z, golden["all"], golden["all.grad"])


def new_code(golden: dict[str, Tensor]) -> None:
    labels, p = golden["labels"], golden["pt"]

    def rows(x: Tensor) -> Tensor:
        return labelled(x, labels, "BA-LoRA", shift=False)

    k, norm = int(golden["svd_k"]), "fro" if golden["frob"] else "sum"
    made = (
        lambda x: regularisers.kl_consistency(rows(x), rows(p), float(golden["temp"])),
        lambda x: regularisers.entropy_diversity(rows(x), int(golden["topk"])),
        lambda x: regularisers.spectral_energy(rows(x), k, norm),
    )
    for name, term in zip(TERMS, made, strict=True):
        check(f"new.{name}", term, golden["ft"], golden[name], golden[f"{name}.grad"])


def schedule(name: str, rows: Tensor, base: tuple[float, float, float]) -> None:
    found = re.fullmatch(r"new\.schedule_T(\d+)_w([\d.]+)_r([\d.]+)", name)
    assert found is not None, name
    total = int(found[1])
    lambdas = dict(zip(("lambda1", "lambda2", "lambda3"), base, strict=True))
    config = BALoraConfig(task="nlg", warmup_ratio=float(found[2]), ramp_ratio=float(found[3]), **lambdas)
    objective = BALora(config, None)
    for step in range(total):
        objective.at(step, total)
        close(f"{name}[{step}]", torch.tensor(objective._scheduled(config.settings("nlg"))), rows[step].float())


def check(name: str, term, z: Tensor, value: Tensor, gradient: Tensor) -> None:
    x = z.clone().requires_grad_()
    found = term(x)
    close(name, found, value)
    (grad,) = torch.autograd.grad(found, x)
    close(f"{name}.grad", grad, gradient)


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
