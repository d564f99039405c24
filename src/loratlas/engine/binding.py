"""Adapters whose update is a function of W belong to one base: its fingerprint travels with them.

    W' = f(W, parameters)        on another W the same parameters are another update

The fingerprint of every adapted weight is a buffer beside the method's own, made at the start and compared when a file
is loaded (`Method.bound` says where). Values count, not their storage: a bf16 checkpoint read as fp32 is the same base.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas.engine.config import AtlasConfig, knob

BASE_HASH = "base_hash"  # (4,) int64
ANOTHER_BASE = (
    "its weight is not the one that this adapter was trained on, and the adapter's update is a function of the weight: "
    "load the very same checkpoint, or, where that is meant (another precision, a quantised base), set check_base to "
    "false in adapter_config.json."
)


@dataclass
class BoundConfig(AtlasConfig):
    """What the methods share whose update is a function of W."""

    check_base: bool = knob(
        True, "Refuse to load the adapter on a base whose weights are not those it was trained on, bit for bit."
    )


def fingerprint(weight: Tensor) -> Tensor:
    """SHA-256 of a matrix's values in row order, as (4,) int64."""
    rows = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(hashlib.sha256(rows.data).digest()), dtype=torch.int64)
