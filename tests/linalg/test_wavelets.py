"""The periodised transform: orthonormal at every even length, equal to its definition, and its filters."""

from __future__ import annotations

import sys

import pytest
import torch

from loratlas.errors import UserError
from loratlas.linalg.wavelets import filters, join, split

BUILT_IN = ("haar", "db2")
MORE = ("db4", "db8", "sym5", "coif1")


def known(name: str) -> str:
    if name not in BUILT_IN:
        pytest.importorskip("pywt")
    return name


@pytest.mark.parametrize("name", BUILT_IN + MORE)
@pytest.mark.parametrize("size", [2, 4, 6, 16])
def test_it_is_orthonormal_and_its_own_definition(name: str, size: int) -> None:
    wavelet = filters(known(name))
    eye = torch.eye(size, dtype=torch.float64)
    low, high = split(eye, wavelet)
    both = torch.cat((low, high), dim=1).T
    torch.testing.assert_close(both @ both.T, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(join(low, high, wavelet), eye, rtol=0, atol=1e-9)
    for taps, operator in zip(wavelet, (low.T, high.T), strict=True):
        expected = torch.zeros(size // 2, size, dtype=torch.float64)
        for i in range(size // 2):
            for k, value in enumerate(taps):
                expected[i, (2 * i + k) % size] += value
        torch.testing.assert_close(operator, expected)


def test_gradients_flow_through_both_directions() -> None:
    x, wavelet = torch.randn(2, 8, dtype=torch.float64, requires_grad=True), filters("db2")
    assert torch.autograd.gradcheck(lambda x: split(x, wavelet), (x,))
    assert torch.autograd.gradcheck(lambda x: join(x, 2 * x, wavelet), (x,))


def test_db2_is_that_of_pywavelets() -> None:
    pywt = pytest.importorskip("pywt")
    for name in BUILT_IN:
        assert filters(name).low == pytest.approx(pywt.Wavelet(name).rec_lo, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dbx", "there is no wavelet 'dbx': did you mean "),
        ("nothing", "there is no wavelet 'nothing': haar, db2 to db38"),
        ("bior2.2", "the wavelet 'bior2.2' is not orthogonal"),
        ("dmey", "the wavelet 'dmey' is not orthogonal"),
    ],
)
def test_a_wavelet_that_cannot_be_is_named(name: str, message: str) -> None:
    pytest.importorskip("pywt")
    with pytest.raises(UserError, match=message):
        filters(name)


def test_without_pywavelets_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    with pytest.raises(UserError, match=r"'db7' needs PyWavelets.*built in are haar, db1, db2.*loratlas\[wavelet\]"):
        filters("db7")
