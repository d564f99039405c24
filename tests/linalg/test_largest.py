"""The k largest over many tensors: against a sort of all, ties and chunks included."""

from __future__ import annotations

import pytest
import torch

from loratlas.linalg import largest
from loratlas.linalg.largest import cut_at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 499, 500, 900])
def test_as_a_sort_would(dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "CHUNK", 64)
    generator = torch.Generator().manual_seed(k)
    # magnitudes far apart, neighbours that differ in the last bit, and hundreds of exact zeros
    parts = [torch.rand(n, generator=generator, dtype=dtype) ** 9 for n in (3, 0, 397, 100)]
    parts.append(torch.nextafter(parts[2], torch.ones((), dtype=dtype)))
    parts.append(torch.zeros(3, dtype=dtype))
    flat = torch.cat(parts)
    cut = cut_at(lambda: parts, k)
    taken = torch.cat([cut.take(part) for part in parts])
    ordered = flat.sort(descending=True).values
    assert cut.value == ordered[k - 1]
    assert int(taken.sum()) == k
    assert torch.equal(flat[taken].sort(descending=True).values, ordered[:k])


def test_ties_are_taken_in_order_or_all() -> None:
    parts = [torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0.5, 2.0])]
    cut = cut_at(lambda: parts, 3)
    assert [cut.take(part).tolist() for part in parts] == [[True, True, False], [False, True]]
    cut = cut_at(lambda: parts, 3)
    assert [cut.take(part, every_tie=True).tolist() for part in parts] == [[True] * 3, [True] * 2]
