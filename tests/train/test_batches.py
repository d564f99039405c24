"""Batches of texts of like lengths."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import small
from test_resume import At, adapter, spec

from loratlas import UserError
from loratlas.train.batches import ByLength, text_lengths
from loratlas.train.data import TaskData, load_task
from loratlas.train.run import run
from loratlas.train.stop import Stop, Stopped
from loratlas.train.tables import read_tables


def drawn(rows: int) -> list[int]:
    return random.Random(0).choices(range(3, 60), k=rows)


def batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def padding(lengths: list[int], found: list[list[int]]) -> int:
    return sum(max(lengths[row] for row in batch) * len(batch) for batch in found) - sum(lengths)


def test_every_row_comes_once_and_little_is_padded() -> None:
    lengths = drawn(1003)
    sampler = ByLength(lengths, 8, seed=3)
    rows = list(sampler)
    assert sorted(rows) == list(range(1003))
    found = batches(rows, 8)
    assert [len(batch) for batch in found] == [8] * 125 + [3]
    assert padding(lengths, found) < 0.1 * padding(lengths, batches(list(range(1003)), 8))


def test_short_and_long_batches_are_mixed() -> None:
    lengths = list(range(400))
    first = [batch[0] for batch in batches(list(ByLength(lengths, 8, seed=0)), 8)]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_the_rows_follow_from_seed_and_epoch() -> None:
    lengths = drawn(100)
    sampler = ByLength(lengths, 8, seed=3)
    rows = list(sampler)
    assert list(sampler) == rows
    sampler.set_epoch(1)
    assert list(sampler) != rows
    sampler.set_epoch(0)
    assert list(sampler) == rows
    assert list(ByLength(lengths, 8, seed=4)) != rows


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def reviews(bert: str, tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    rows = small.write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", small.reviews(120))
    return load_task(read_tables(rows), bert, name="reviews")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_resumes_bit_for_bit_in_its_second_epoch(
    bert: str, reviews: TaskData, tmp_path: Path, bf16: bool
) -> None:
    """An epoch has 14 steps; bf16 on a machine without an accelerator."""
    settings = {"steps": 24, "group_by_length": True, "bf16": bf16}
    whole = run(spec(bert, tmp_path / "whole", **settings), reviews)
    broken = spec(bert, tmp_path / "broken", **settings)
    with pytest.raises(Stopped), Stop() as stop:
        run(broken, reviews, At(17, lambda: setattr(stop, "requested", True)), stop=stop)
    assert run(broken, reviews, resume=True).history == whole.history
    assert adapter(tmp_path / "broken") == adapter(tmp_path / "whole")
    assert run(spec(bert, tmp_path / "other", **{**settings, "group_by_length": False}), reviews).history != (
        whole.history
    )


def test_images_have_no_length(bert: str, reviews: TaskData, tmp_path: Path) -> None:
    pictures = replace(reviews, train=reviews.train.rename_column("input_ids", "pixels"))
    with pytest.raises(UserError, match="--group-by-length is for texts"):
        text_lengths(pictures.train)
