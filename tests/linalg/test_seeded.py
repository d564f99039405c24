"""Seeded tensors: the same in any pieces, silent about torch's own random state, differentiable, recognisable."""

from __future__ import annotations

import pytest
import torch

from loratlas.linalg import seeded
from loratlas.linalg.seeded import Bases, Stream, combine, fingerprint, same_numbers, seed_of


def test_pieces_join_to_the_whole_and_leave_the_global_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    bases = Bases(5, 7, (3, 11), bound=0.5, divisor=2.0)
    whole = Stream(5).uniform((7, 33), 0.5) / 2.0
    assert torch.equal(bases.whole(), whole)
    for chunk in (1, 33, 70, 100):
        monkeypatch.setattr(seeded, "CHUNK", chunk)
        pieces = list(bases.pieces())
        assert max(len(piece) for piece in pieces) == max(1, chunk // 33)
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):
        assert torch.equal(bases.whole(), whole)


def test_a_stream_goes_on_and_seeds_follow_names() -> None:
    stream = Stream(3)
    both = Stream(3).unit((2, 40))
    assert torch.equal(torch.stack([stream.unit((40,)), stream.unit((40,))]), both)
    assert seed_of(0, "encoder.query", "A") == seed_of(0, "encoder.query", "A") < 2**32
    assert len({seed_of(0, "a", "A"), seed_of(0, "a", "B"), seed_of(0, "b", "A"), seed_of(1, "a", "A")}) == 4


def test_a_combination_is_the_explicit_sum_with_its_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "CHUNK", 40)
    bases = Bases(1, 9, (4, 5))
    explicit = bases.whole().double().view(9, 4, 5)
    c = torch.randn(9, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(combine(c, bases), torch.einsum("k,kij->ij", c, explicit))
    assert torch.autograd.gradcheck(lambda v: combine(v, bases), c)
    assert torch.autograd.gradgradcheck(lambda v: combine(v, bases) ** 3, c)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        combine(c, bases)
    assert not kept


def test_a_fingerprint_tells_numbers_apart_and_forgives_rounding() -> None:
    values = Stream(0).uniform((50, 40))
    mine = fingerprint(values)
    assert same_numbers(fingerprint(values.bfloat16()), mine)
    assert not same_numbers(fingerprint(Stream(1).uniform((50, 40))), mine)
    assert not same_numbers(fingerprint(values.flip(0)), mine)
    assert not same_numbers(mine[:4], mine)
