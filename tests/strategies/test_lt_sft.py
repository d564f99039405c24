"""LT-SFT: what is chosen, what stays exactly where it was, fresh phases, resume, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_net import TRUNK, Net, adamw, batch, config, differing, loss, shifted, train, tuned, values
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, get_scheduler

from loratlas import LtSftCallback, LtSftConfig, UserError
from loratlas.strategies.lottery import Tickets, tickets
from loratlas.train.atomic import AtomicCheckpoints

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from launch import two_ranks


@pytest.mark.parametrize("rounds", [1, 3])
def test_k_entries_change_and_all_others_are_the_start(rounds: int) -> None:
    model, strategy = tuned(steps=30, num_params=40, n_iterations=rounds)  # weight decay pulls at every entry
    start, end = values(Net()), values(model)
    masks = strategy.state_dict()["masks"]
    assert sum(int(mask.sum()) for mask in masks.values()) == 40
    for name, mask in masks.items():
        assert torch.equal(end[name][~mask], start[name][~mask]), name
    assert 38 <= differing(start, end, "trunk") <= 40
    assert torch.equal(start["trunk.1.weight"], end["trunk.1.weight"])  # the norm
    assert differing(start, end, "head") == sum(p.numel() for p in model.head.parameters())


def test_phases_choose_the_farthest_and_rewind_the_head_too() -> None:
    model, start = Net(), values(Net())
    full, optimizer = Net(), adamw(model)
    train(
        full,
        torch.optim.AdamW([p for n, p in full.named_parameters() if "trunk.1" not in n], 1e-2, weight_decay=0.1),
        range(10),
    )
    strategy = config().build().attach(model, optimizer, 20)
    train(model, optimizer, range(10))
    assert strategy.sparse
    assert not optimizer.state
    assert differing(values(model), start) == 0
    far = {name: (p - start[name]).abs() for name, p in values(full).items() if name in strategy.state_dict()["masks"]}
    least = torch.cat([score.flatten() for score in far.values()]).sort(descending=True).values[39]
    for name, mask in strategy.state_dict()["masks"].items():
        assert torch.equal(mask, far[name] >= least), name


def test_all_entries_are_full_training_from_the_start() -> None:
    model = Net()
    optimizer = adamw(model)
    strategy = config(num_params=None, proportion=1.0, freeze_layer_norm=False).build()
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=20)
    strategy.attach(model, optimizer, 20, scheduler=scheduler)
    train(model, optimizer, range(20), scheduler=scheduler)
    again = Net()
    optimizer = adamw(again)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=10)
    train(again, optimizer, range(10, 20), scheduler=scheduler)
    assert differing(values(model), values(again)) == 0


def test_tickets_beat_random_entries_of_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [shifted_loss(seed) for seed in range(3)]
    monkeypatch.setattr(Tickets, "draw", anything)
    # at this rate; at three times the rate one of the three networks does as well with a random mask, or better
    for seed, ours in enumerate(losses):
        assert ours < shifted_loss(seed)


def shifted_loss(seed: int) -> float:
    """Of a network after it was tuned to itself with a few entries changed."""
    model, goal = Net(seed), shifted(Net(seed), seed)
    strategy = config(freeze="^head").build().attach(model, optimizer := adamw(model, decay=0.0), 400)
    train(model, optimizer, range(400), goal)  # in fewer no entry could move by the 1 that it has to
    strategy.detach()
    return loss(model, goal)


def anything(self: Tickets, k: int, every_tie: bool) -> None:
    """`draw` without regard to what moved."""
    order = torch.randperm(self.size, generator=torch.Generator().manual_seed(0)) < k
    parts = order.split([p.numel() for p in self.maskable.values()])
    for (name, p), part in zip(self.maskable.items(), parts, strict=True):
        self.masks[name] = part.view_as(p)
        p.copy_(self.start[name])


def test_l1_pulls_towards_the_start_and_is_masked() -> None:
    start = values(Net())
    far, near = (values(tuned(l1_sparse=weight, l1_dense=0.0)[0]) for weight in (0.0, 30.0))
    moved = [sum(float((v[n] - start[n]).abs().sum()) for n in start if n.startswith("trunk")) for v in (far, near)]
    assert moved[1] < 0.8 * moved[0]
    assert differing(start, near, "trunk") <= 40


def test_masks_come_before_clipping() -> None:
    model = Net()
    optimizer = adamw(model)
    strategy = config().build().attach(model, optimizer, 20)
    train(model, optimizer, range(10))
    x, y = batch(10)
    F.mse_loss(model(x), y).backward()
    for name, mask in strategy.state_dict()["masks"].items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        assert not grad[~mask].any(), name


def test_models_of_transformers_know_their_base() -> None:
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11)
    )
    found = tickets(bert, None, "word_embeddings", True)
    assert set(found.whole) == {"classifier.weight", "classifier.bias"}
    assert all(("LayerNorm" in name) != (name == "bert.embeddings.word_embeddings.weight") for name in found.frozen)
    assert all(name.startswith("bert.") for name in found.maskable)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y = batch(i)
        return {"x": x[0], "labels": y[0]}


class Loss(Net):
    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        found = super().forward(x)
        return {"loss": F.mse_loss(found, labels), "logits": found}


class AtomicTrainer(AtomicCheckpoints, Trainer):
    pass


def trainer(folder: Path, base: type[Trainer] = AtomicTrainer, **options: Any) -> tuple[Any, LtSftCallback]:
    strategy = config(n_iterations=2, **options).build()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=16,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
    )
    return base(Loss(), args, train_dataset=Rows(), callbacks=[strategy]), strategy


def test_a_run_resumes_bit_for_bit_in_every_phase(tmp_path: Path) -> None:
    whole, strategy = trainer(tmp_path)
    whole.train()
    expected, masks = values(whole.model), strategy.state_dict()["masks"]
    for step in (2, 4, 6, 8, 11, 12, 16):  # in the phases, at their ends, and after the last
        again, other = trainer(tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert differing(expected, values(again.model)) == 0, step
        delta = other.delta(again.model)
        assert all(torch.equal(mask, other.state_dict()["masks"][name]) for name, mask in masks.items())
        assert delta.count == strategy.delta(whole.model).count


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_params": 60}, "chooses K = 40 entries, and now K is 60"),
        ({"dense_steps": 2}, r"phases of \[4, 4, 4, 4\] steps, and now they are \[2, 6, 2, 6\]"),
        ({"freeze": "trunk.0"}, "trained other parameters"),
    ],
)
def test_a_resumed_run_keeps_its_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    first, _ = trainer(tmp_path)
    first.train()
    other, _ = trainer(tmp_path / "other", **options)
    with pytest.raises(UserError, match=says):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_without_the_start_is_refused(tmp_path: Path) -> None:
    plain, _ = trainer(tmp_path, Trainer)
    plain.train()
    with pytest.raises(UserError, match="resume with a Trainer that has AtomicCheckpoints"):
        trainer(tmp_path / "other", Trainer)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_bad_input_says_what_to_do() -> None:
    model = Net()
    with pytest.raises(UserError, match=f"num_params must be at most {TRUNK}, the number of entries to choose from"):
        config(num_params=TRUNK + 1).check(model)
    with pytest.raises(UserError, match="proportion must be at least"):
        config(num_params=None, proportion=1e-6).check(model)
    with pytest.raises(UserError, match="maskable='nowhere' finds none"):
        LtSftConfig(maskable="nowhere").check(model)
    with pytest.raises(UserError, match="pass total_steps"):
        config().build().attach(model, adamw(model))
    with pytest.raises(UserError, match="1 leave one without"):
        config().build().attach(model, adamw(model), 1)
    with pytest.raises(UserError, match="does not hold all parameters"):
        config().build().attach(model, adamw(model.head), 10)
    with pytest.raises(UserError, match="Adagrad cannot start again"):
        config().build().attach(model, torch.optim.Adagrad(model.parameters()), 10)
    with pytest.raises(UserError, match="has chosen no entries yet"):
        config().build().delta(model)
    _, strategy = tuned()
    with pytest.raises(UserError, match="has changed outside the mask"):
        strategy.delta(tuned(num_params=200)[0])


def test_two_ranks_choose_and_train_alike(tmp_path: Path) -> None:
    two_ranks(Path(__file__).parent / "lt_sft_ranks.py", tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    from lt_sft_ranks import run

    alone = run([0, 1], lambda model: model)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)
