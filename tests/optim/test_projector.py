"""Bases are orthonormal, chosen by what the gradient has most of, and moments follow vectors that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import TALL, WIDE, normal

from loratlas import UserError
from loratlas.linalg import dct
from loratlas.optim.projector import BASES, SIDES, Projector

CPU = torch.device("cpu")


def projected(projector: Projector, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """R, back(R) and the bases."""
    state: dict[str, Any] = {}
    projector.refresh([state], [matrix])
    bases = projector.bases(state, tuple(matrix.shape), matrix.dtype)
    reduced = bases.down(matrix)
    return reduced, bases.add_back(torch.zeros_like(matrix), reduced, 1.0), bases


@pytest.mark.parametrize("shape", [TALL, WIDE, (6, 6)])
@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("basis", BASES)
def test_projection_is_orthogonal(basis: str, proj_type: str, shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    reduced, back, bases = projected(Projector(3, basis, proj_type), matrix)
    sides = Projector(3, basis, proj_type).sides(shape)
    assert reduced.shape == tuple(3 if dim in sides else size for dim, size in enumerate(shape))
    for dim, rows in enumerate(bases):
        assert (rows is not None) == (dim in sides)
        if rows is not None:
            torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
    # Pythagoras: what is left out is orthogonal to what is kept
    torch.testing.assert_close((matrix - back).square().sum() + reduced.square().sum(), matrix.square().sum())


@pytest.mark.parametrize(
    ("proj_type", "sides"),
    [("std", "110"), ("reverse_std", "001"), ("right", "111"), ("left", "000")],
)
def test_the_side_follows_the_weights_shape(proj_type: str, sides: str) -> None:
    shapes = [TALL, (6, 6), WIDE]
    assert "".join(str(Projector(3, proj_type=proj_type).sides(shape)[0]) for shape in shapes) == sides


@pytest.mark.parametrize("basis", BASES)
def test_full_rank_loses_nothing(basis: str) -> None:
    for shape in (TALL, WIDE):
        matrix = normal(*shape)
        _, back, _ = projected(Projector(99, basis), matrix)
        torch.testing.assert_close(back, matrix, rtol=0, atol=2e-6)


@pytest.mark.parametrize("evaluation", ["matmul", "fft"])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
def test_the_largest_products_are_chosen(basis: str, evaluation: str) -> None:
    matrix, r = normal(*TALL, dtype=torch.float64), 2
    every = matrix @ dct.table(basis, 6, 0, torch.float64, CPU).T
    for norm in (1, 2, -1, -2):
        state: dict[str, Any] = {}
        Projector(r, basis, select_norm=norm, evaluation=evaluation).refresh([state], [matrix])
        scores = every.abs().pow(abs(norm)).sum(0).pow(1 / abs(norm))
        if norm < 0:
            scores = scores * dct.table(basis, 6, 0, torch.float64, CPU).abs().pow(-norm).sum(1).pow(-1 / norm)
        assert state["right_index"].tolist() == sorted(scores.topk(r).indices.tolist())
        assert state["right_index"].dtype == torch.int32
    _, back, _ = projected(Projector(r, basis, select_norm=2, evaluation=evaluation), matrix)
    lost = every.square().sum(0).sort().values[:-r].sum()
    torch.testing.assert_close((matrix - back).square().sum(), lost)
    assert lost <= (1 - r / 6) * matrix.square().sum()


def test_the_lowest_index_wins_a_tie() -> None:
    state: dict[str, Any] = {}
    Projector(2, "random").refresh([state], [torch.zeros(8, 5)])
    assert state["right_index"].tolist() == [0, 1]


def test_a_vector_that_stays_is_found_again() -> None:
    states = [{"right_index": torch.tensor([0, 2, 5], dtype=torch.int32)} for _ in range(2)]
    table = dct.table("dct2", 6, 0, torch.float32, CPU)
    chosen = [[2, 3, 5], [0, 2, 5]]
    carried = Projector(3, "dct2").refresh(states, [table[rows].sum(0).expand(12, 6).contiguous() for rows in chosen])
    (dim, source, kept), (_, source_2, kept_2) = carried[0][0], carried[1][0]
    assert (dim, kept.tolist()) == (1, [True, False, True])
    assert source[kept].tolist() == [1, 2]
    assert (source_2.tolist(), kept_2.tolist()) == ([0, 1, 2], [True, True, True])
    assert [state["right_index"].tolist() for state in states] == chosen


def test_wrong_options_are_named() -> None:
    for options, field in (
        ({"basis": "dft"}, "basis"),
        ({"proj_type": "up"}, "proj_type"),
        ({"select_norm": 3}, "select_norm"),
        ({"evaluation": "fft", "basis": "random"}, "evaluation"),
        ({"svd_method": "fast"}, "svd_method"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(UserError) as error:
            Projector(**{"rank": 2, **options})
        assert error.value.field == field
