"""Which parameters of a model are projected, and that plain loops and the Trainer take what the configs build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from loratlas import UserError
from loratlas.catalog import find, load_entry
from loratlas.engine.parts import OptimizerConfig
from loratlas.optim.galore import GaLoreConfig
from loratlas.optim.groups import parameter_groups


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=16, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config)


def test_all_linear_leaves_embeddings_and_heads() -> None:
    model = gpt2()
    projected, dense, vectors = parameter_groups(model, {"rank": 2}, weight_decay=0.1)
    assert len(projected["params"]) == 8  # four a layer
    assert all(name.startswith("transformer.h.") for name, _ in projected["params"])
    assert [name for name, _ in dense["params"]] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(p.dim() == 1 for _, p in vectors["params"])
    assert [group["weight_decay"] for group in (projected, dense, vectors)] == [0.1, 0.1, 0.0]
    assert [group.get("rank") for group in (projected, dense, vectors)] == [2, None, None]
    total = sum(len(group["params"]) for group in (projected, dense, vectors))
    assert total == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("targets", "excluded", "count"),
    [
        (["attn"], None, 4),
        (["c_fc", "mlp.c_proj"], None, 4),
        (r".*h\.0\..*", None, 4),
        ("all-linear", ["h.1"], 4),
        (["wte"], None, 1),
    ],
)
def test_targets(targets: object, excluded: object, count: int) -> None:
    groups = parameter_groups(gpt2(), {"rank": 2}, targets, excluded)
    assert len(groups[0]["params"]) == count


def test_nothing_to_project_is_told() -> None:
    with pytest.raises(UserError, match=r"\['q_proj'\] names no trainable matrix .* transformer\.wte\.weight") as error:
        GaLoreConfig(r=2, target_modules=["q_proj"]).check(gpt2())
    assert error.value.field == "target_modules"
    with pytest.raises(UserError, match="unfreeze"):
        GaLoreConfig(r=2).check(gpt2().requires_grad_(False))


class Texts(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 12) % 40
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("slug", ["galore", "fira", "dct-adamw"])
def test_the_trainer_trains_with_it(slug: str, tmp_path: Path) -> None:
    model, config = gpt2(), load_entry(find(slug))(r=4)
    assert isinstance(config, OptimizerConfig)
    assert config.name == slug
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config.check(model)
    optimizer = config.build(model, lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, args, train_dataset=Texts(), optimizers=(optimizer, schedule))
    losses = [trainer.train().training_loss, trainer.evaluate(Texts())["eval_loss"]]
    assert losses[1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("slug", ["galore", "fira", "dct-adamw"])
def test_schedulers_see_the_rate(slug: str) -> None:
    optimizer = load_entry(find(slug))(r=2).build(nn.Sequential(nn.Linear(6, 8)), lr=0.02)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
