"""Rows in random order."""

from __future__ import annotations

from itertools import pairwise

import torch

from loratlas.linalg.shuffles import by_length


def test_batches_of_like_lengths() -> None:
    rows = torch.arange(3, 100, 3)  # 33 of the rows
    lengths = torch.randint(1, 60, (100,), generator=torch.Generator().manual_seed(0))
    batches = by_length(rows, lengths, 4, torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(batches).sort().values, rows)
    assert [len(batch) for batch in batches] == [4] * 8 + [1]
    bounds = sorted((int(lengths[batch].min()), int(lengths[batch].max())) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in pairwise(bounds))  # one span: all sorted
    other = by_length(rows, lengths, 4, torch.Generator().manual_seed(2))
    assert [batch.tolist() for batch in other] != [batch.tolist() for batch in batches]
