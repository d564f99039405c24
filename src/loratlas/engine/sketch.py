"""Directions of the current gradient, from thin products alone.

With g (tokens, out) and x (tokens, in) of a backward pass, dL/dW = g^T x. A random probe P (out, k) gives the sketch

    Z = P^T dL/dW = (g P)^T x      (k, in),  summed over the batches of a few steps

whose row space is close to the leading right singular space of dL/dW when k is a little more than the number of
directions that are wanted (Halko, Martinsson, Tropp 2011, section 4). No (out, in) matrix is ever formed; the layers'
backward pass gathers it (`probe` and `sketch` of `engine.factors.Factors`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratlas.engine.sharded import from_rank0

OVERSAMPLING = 4


def probe(seed: int, width: int, k: int, like: Tensor) -> Tensor:
    """P (width, k), standard normal, the same on all ranks."""
    drawn = torch.randn(width, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.to(device=like.device, dtype=like.dtype)


def directions(sketch: Tensor, count: int, kept: Tensor) -> Tensor:
    """`count` orthonormal rows (count, in): the leading row space of the sketch outside that of `kept` (k, in).

    Ranks of a distributed run agree on the result. Where the sketch is empty or not finite,
    or has fewer directions, random ones take their place.
    """
    if not bool(torch.isfinite(sketch).all()):
        sketch = torch.zeros_like(sketch)
    size = torch.linalg.vector_norm(sketch)
    generator = torch.Generator().manual_seed(sketch.shape[1])
    spare = torch.randn(count, sketch.shape[1], generator=generator).to(sketch)
    # far below what the sketch knows, but enough to fill up what it lacks
    rows = torch.cat((sketch / size.clamp_min(torch.finfo(sketch.dtype).tiny), 1e-6 * spare))
    basis = torch.linalg.qr(kept.T.to(rows.dtype)).Q
    for _ in range(2):  # once is not orthogonal to the last digit
        rows = rows - (rows @ basis) @ basis.T
    found = torch.linalg.svd(rows, full_matrices=False).Vh[:count]
    return from_rank0(found.contiguous())
