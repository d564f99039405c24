"""One level of an orthonormal wavelet transform of the last axis, periodised: d values become d / 2 low and d / 2 high.

    low[i] = sum_k lo[k] x[(2 i + k) mod d]      high[i] = sum_k hi[k] x[(2 i + k) mod d]      hi[k] = (-1)^k lo[K-1-k]

With P_L, P_H (d / 2, d) for these maps, [P_L; P_H] is orthonormal for every even d, also one shorter than the filter.
Neither is ever formed: the even and odd entries are filtered by themselves, entry m by lo[2 m] and lo[2 m + 1].
"""

from __future__ import annotations

import difflib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratlas.errors import UserError

_BUILT_IN = ("haar", "db1", "db2")
_TOLERANCE = 1e-8  # of orthonormality: above the digits of published tables, below every filter that is none
Filter = tuple[float, ...]


class Filters(NamedTuple):
    """The two filters of a wavelet, of equal and even length K."""

    low: Filter
    high: Filter


@functools.cache
def filters(name: str) -> Filters:
    """The filters of an orthogonal wavelet: haar, db1 and db2 are built in, others are those of PyWavelets.

    Raises:
        UserError: PyWavelets is missing, knows no such wavelet, or knows it as one that is not orthogonal.
    """
    low = _built_in(name) if name in _BUILT_IN else _from_pywavelets(name)
    return Filters(low, tuple((-1) ** k * value for k, value in enumerate(reversed(low))))


def split(x: Tensor, wavelet: Filters) -> tuple[Tensor, Tensor]:
    """(low, high), each (..., d / 2), of x (..., d) with d even."""
    return analyse(x, wavelet.low), analyse(x, wavelet.high)


def join(low: Tensor, high: Tensor, wavelet: Filters) -> Tensor:
    """x (..., d) of its (low, high), each (..., d / 2): the inverse of `split`."""
    return synthesise(low, wavelet.low) + synthesise(high, wavelet.high)


def analyse(x: Tensor, taps: Filter) -> Tensor:
    """x P^T, (..., d / 2), for x (..., d) and the operator P of one filter."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = zip(taps[0::2], taps[1::2], strict=True)
    return _total([_rolled(even, -m) * a + _rolled(odd, -m) * b for m, (a, b) in enumerate(pairs)])


def synthesise(half: Tensor, taps: Filter) -> Tensor:
    """c P, (..., d), for c (..., d / 2) and the operator P of one filter."""
    shifted = [_rolled(half, m) for m in range(len(taps) // 2)]
    even, odd = (_total([c * a for c, a in zip(shifted, taps[start::2], strict=True)]) for start in (0, 1))
    return torch.stack((even, odd), dim=-1).flatten(-2)


def _rolled(x: Tensor, by: int) -> Tensor:
    return x.roll(by, dims=-1) if by else x


def _total(terms: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _built_in(name: str) -> Filter:
    if name != "db2":
        return (math.sqrt(0.5), math.sqrt(0.5))
    q = math.sqrt(3.0)
    return tuple(value / (4.0 * math.sqrt(2.0)) for value in (1.0 + q, 3.0 + q, 3.0 - q, 1.0 - q))


def _from_pywavelets(name: str) -> Filter:
    try:
        import pywt
    except ImportError:
        raise UserError(
            f"the wavelet {name!r} needs PyWavelets, which is not installed (built in are {', '.join(_BUILT_IN)}): "
            "pip install 'loratlas[wavelet]'."
        ) from None
    known: list[Any] = pywt.wavelist(kind="discrete")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "haar, db2 to db38, sym2 to sym20 and coif1 to coif17."
        raise UserError(f"there is no wavelet {name!r}: {hint}")
    low = tuple(float(value) for value in pywt.Wavelet(name).rec_lo)
    for shift in range(0, len(low), 2):
        product = math.fsum(a * b for a, b in zip(low, low[shift:], strict=False))
        if abs(product - (shift == 0)) > _TOLERANCE:
            raise UserError(
                f"the wavelet {name!r} is not orthogonal, so its transform does not undo itself: take haar, "
                "or one of the families db, sym and coif."
            )
    return low
