"""FILA: a LoRA that starts on the part of W that matters to what is to be forgotten (arXiv 2408.06621, code read).

    I = F_forget / (eps + F_retain),    w_i = sqrt(sum_j I_ij)        relative Fisher information, (out, in) and (out,)
    diag(w) W ~ U S V^T, rank r         A* = sqrt(S / s) V^T,   B* = diag(1 / (w + eps)) U sqrt(S / s)
    W' = W + s (B A - B* A*)

s B* A* is the best rank-r part of W where row i counts w_i, so that A and B act at once on the directions that hold
what is to be forgotten. The paper moves it out of W; here W stays as it is (see `engine.pairs`). The factors are
unbalanced by w, which changes their effective learning rates. `loratlas.relative_fisher` measures I.
"""

from __future__ import annotations

from torch import Tensor

from loratlas.engine import pairs
from loratlas.engine.method import RELATIVE_FISHER, View
from loratlas.engine.relative_fisher import row_weights
from loratlas.linalg.factorise import row_weighted_svd

FILA = ("fila", "fila-code")
# torch.svd_lowrank(q=r, niter=2) from the global generator: no oversampling, so it depends on the seed
CODE = {"method": "torch", "niter": 2}


def fila_start(t: View, weight: Tensor) -> int | None:
    """Start the pairs of `t`; returns the rank where the weighted W has less than t.r, as `Method.init` does."""
    options = CODE if t.cfg.init_weights == "fila-code" else t.cfg.svd_options()
    rows = row_weights(t.statistics[RELATIVE_FISHER].to(weight.dtype))
    up, s, vh = row_weighted_svd(weight, rows, t.r, **options)
    if len(s) < t.r:
        return len(s)
    pairs.start(t, *pairs.principal_factors(up, s, vh, t.scaling))
    return None
