"""A penalty that keeps the factors of an update orthonormal.

    R = mean over all 2 M factors of  || A A^T - I ||_F  and  || B^T B - I ||_F,      A (r, in),  B (out, r)

(AdaLoRA, arXiv 2303.10512, eq. 4, in the unsquared form of IncreLoRA's and TriAdaptLoRA's code.) Slots that are not in
use count neither in the product nor in I.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(downs: Sequence[Tensor], ups: Sequence[Tensor], used: Sequence[Tensor]) -> Tensor:
    """The mean R over the modules; factors of one shape go in one product. used: (r,) ones and zeros, a module each."""
    stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for down, up, mask in zip(downs, ups, used, strict=True):
        stacks[down.shape].append((down * mask[:, None], mask))
        stacks[up.T.shape].append((up.T * mask[:, None], mask))
    total = downs[0].new_zeros(())
    for rows in stacks.values():
        factors = torch.stack([factor for factor, _ in rows])
        identity = torch.diag_embed(torch.stack([mask for _, mask in rows]))
        total = total + torch.linalg.matrix_norm(factors @ factors.mT - identity).sum()
    return total / (2 * len(downs))
