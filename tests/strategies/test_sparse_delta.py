"""Sparse deltas: adding, removing exactly, files, the official format, and bases that do not match."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_net import Batch, Net, adamw, batch, config, differing, loss, shifted, train, values
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from loratlas import SparseDelta, UserError, compose_deltas


def learned(model: nn.Module, goal: Callable[[int], Batch], **options: object) -> SparseDelta:
    """The delta of `model`, which is left trained."""
    strategy = config(**{"freeze": "^head", **options}).build()
    optimizer = adamw(model, decay=0.0)
    strategy.attach(model, optimizer, 400)  # in fewer no entry could move by the 1 that it has to
    train(model, optimizer, range(400), goal)
    strategy.detach()
    return strategy.delta(model)


@pytest.fixture(scope="module")
def language() -> SparseDelta:
    return learned(Net(), shifted(Net(), 1))


@pytest.fixture(scope="module")
def task() -> SparseDelta:
    return learned(Net(), shifted(Net(), 2))


def test_two_deltas_compose_with_the_gains_of_both(language: SparseDelta, task: SparseDelta) -> None:
    both = shifted(Net(), 1, 2)  # what a network would do that had learned both
    base, alone = loss(Net(), both), [loss(delta.merged(Net()), both) for delta in (language, task)]
    composed = loss(compose_deltas([language, task]).merged(Net()), both)
    assert max(alone) < base
    assert composed < min(alone)


def test_order_does_not_matter_and_removal_is_exact(language: SparseDelta, task: SparseDelta) -> None:
    start = values(Net())
    one, other = Net(), Net()
    language.apply(one)
    task.apply(one)
    task.apply(other)
    language.apply(other)
    assert differing(values(one), values(other)) == 0
    assert differing(values(one), values(compose_deltas([task, language]).merged(Net()))) == 0
    assert set(language.indices) & set(task.indices)
    language.remove(one)  # the one below the other
    assert differing(values(one), values(task.merged(Net()))) == 0
    twin = language.merged(one)
    assert differing(values(twin), values(other)) == 0
    task.remove(twin)
    assert differing(values(twin), values(language.merged(Net()))) == 0
    task.remove(one)
    assert differing(values(one), start) == 0


def test_saved_and_loaded_it_is_the_trained_model(tmp_path: Path) -> None:
    model = Net()
    delta = learned(model, batch, freeze=None)
    delta.save(tmp_path / "delta")
    assert sorted(file.name for file in (tmp_path / "delta").iterdir()) == [
        "sparse_delta.json",
        "sparse_delta.safetensors",
    ]
    again = Net()
    SparseDelta.load(tmp_path / "delta").apply(again)
    for name, value in values(model).items():
        torch.testing.assert_close(again.get_parameter(name), nn.Parameter(value), rtol=0, atol=1e-6)
    assert torch.equal(again.head.weight, model.head.weight)
    assert delta.count <= 40


def test_a_task_on_top_of_a_language_belongs_to_the_languages_base(language: SparseDelta) -> None:
    model = Net()
    language.apply(model)
    task = learned(model, shifted(Net(), 1, 2))
    shared = task.base.keys() & language.base.keys()
    assert shared
    assert all(task.base[name] == language.base[name] for name in shared)
    fresh = Net()
    task.apply(fresh)
    language.apply(fresh)
    for name, value in values(model).items():
        torch.testing.assert_close(fresh.get_parameter(name), nn.Parameter(value), rtol=0, atol=1e-6)


def test_a_merged_copy_is_an_ordinary_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(vocab_size=11, **sizes))
    name = "bert.encoder.layer.0.output.dense.weight"
    delta = SparseDelta({name: torch.tensor([3])}, {name: torch.tensor([0.5])}, {name: (8, 8)})
    before = values(bert)
    delta.merged(bert).save_pretrained(tmp_path)
    assert differing(values(bert), before) == 0
    read = BertForSequenceClassification.from_pretrained(tmp_path).get_parameter(name)
    before[name][0, 3] += 0.5
    assert torch.equal(read, before[name])


def test_other_bases_heads_and_files_are_refused(language: SparseDelta, task: SparseDelta, tmp_path: Path) -> None:
    stranger = learned(Net(7), shifted(Net(7), 1))
    with pytest.raises(UserError, match="belong to different base models, which trunk"):
        compose_deltas([language, stranger])
    model = Net(7)
    with pytest.raises(UserError, match="belongs to another base model: trunk"):
        language.apply(model)
    assert differing(values(model), values(Net(7))) == 0
    with pytest.raises(UserError, match="has no parameter trunk"):
        language.apply(nn.Linear(2, 2))
    with pytest.raises(UserError, match="is not applied"):
        language.remove(model)
    head = SparseDelta({}, {}, {}, {"head.weight": torch.zeros(3, 16)})
    with pytest.raises(UserError, match=r"both bring head\.weight whole"):
        compose_deltas([head, copy.copy(head)])
    plain = Net()
    task.apply(plain)
    with pytest.raises(UserError, match="applied to the model already"):
        task.apply(plain)
    with pytest.raises(UserError, match=r"holds no sparse_delta\.json"):
        SparseDelta.load(tmp_path)
    file = language.save(tmp_path / "cut") / "sparse_delta.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"damaged|cut short"):
        SparseDelta.load(tmp_path / "cut")


class Code:
    """What a hostile file would hold."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("run",)


def test_the_official_file_is_read_without_running_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pytorch_diff.bin"
    # (2, 0) and (1, 2) of a 3 x 4 matrix: 2 + 3 * 0 = 2 and 1 + 3 * 2 = 7, as steps 2 and 5
    part = {"size": torch.Size((3, 4)), "index_steps": torch.tensor([2, 5]), "values": torch.tensor([1.0, 2.0])}
    torch.save({"diffs": {"w": part}, "abs": {"b": torch.ones(2)}}, file)
    delta = SparseDelta.load_official(file)
    assert delta.indices["w"].tolist() == [6, 8]
    assert delta.values["w"].tolist() == [2.0, 1.0]
    torch.save({"diffs": Code()}, file)
    with pytest.raises(UserError, match="holds more than tensors"):
        SparseDelta.load_official(file)
    assert capsys.readouterr().out == ""
