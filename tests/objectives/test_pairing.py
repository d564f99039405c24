"""Pairs of a forget and a retain item: the same for everyone, going through the retain set, and marked in batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from loratlas import PairCollator, PairedData, UserError


def test_every_pass_has_all_to_forget_and_goes_on_through_the_retain_set() -> None:
    pairs = PairedData(list("abcd"), list(range(10)), passes=5, seed=3)
    items = list(pairs)
    assert len(items) == len(pairs) == 20
    assert [item["forget"] for item in items] == list("abcd") * 5
    drawn = [item["retain"] for item in items]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))
    assert drawn != [item["retain"] for item in PairedData(list("abcd"), list(range(10)), passes=5, seed=4)]


def test_an_item_depends_on_its_number_alone() -> None:
    pairs = PairedData(list(range(30)), list(range(7)), passes=2)
    whole = [pairs[i] for i in range(60)]
    again = PairedData(list(range(30)), list(range(7)), passes=2)
    assert [again[i] for i in reversed(range(60))] == whole[::-1]


def test_batches_say_which_rows_to_forget() -> None:
    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(rows)}

    both = DataLoader(PairedData([1, 2], [7, 8, 9], passes=1), batch_size=2, collate_fn=PairCollator(collate))
    (found,) = list(both)
    assert found["input_ids"][found["forget"]].tolist() == [1, 2]
    assert set(found["input_ids"][~found["forget"]].tolist()) < {7, 8, 9}
    alone = DataLoader(PairedData([1, 2], None, passes=1), batch_size=2, collate_fn=PairCollator(collate))
    assert next(iter(alone))["forget"].tolist() == [True, True]


def test_what_is_refused() -> None:
    for arguments, message in (
        (([], [1]), "forget set is empty"),
        (([1], []), "retain set is empty"),
        (([1], [1], 0), "passes"),
    ):
        with pytest.raises(UserError, match=message):
            PairedData(*arguments)
    with pytest.raises(IndexError):
        PairedData([1], [1])[5]
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        PairCollator(list)([{}])
