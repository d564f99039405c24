"""SALT: scale and shift of the top singular values, a low-rank update of the rest (arXiv 2503.16055).

    W = U S V^T,   W' = U relu(C) V^T        C = | diag(alpha S_top + beta)                          |
                                                 |                           diag(S_tail) + X Y      |

The k largest singular values get a scale alpha and a shift beta each, the remaining (n - k) x (n - k) block of the core
gets X Y of rank q; n = min(out, in). Official repository: BioMedIA-MBZUAI/SALT. There relu acts on every entry of C.

Here W stays and the update U (relu(C) - S) V^T is carried, which is exactly 0 at the start while Y = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.dense import dense_linear, takes_the_sum
from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.registry import adapter
from loratlas.linalg.svd import top_svd


class Salt(LowRankMethod):
    """Tensors: scale (k,), shift (k,), X (n - k, q), Y (q, n - k) trainable, X and Y None if k = n; U (out, n), S (n,)
    and V (n, in), the right singular vectors as rows."""

    name = "salt"
    kinds = ("linear", "conv1d", "conv2d")
    params = ("scale", "shift", "X", "Y")
    buffers = ("U", "S", "V")

    def shapes(self, cfg: SaltConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        n = min(n_in, n_out)
        k = self.scaled(cfg, n)
        tail = {"X": (n - k, r), "Y": (r, n - k)} if k < n else {}
        return {"scale": (k,), "shift": (k,), **tail, "U": (n_out, n), "S": (n,), "V": (n, n_in)}

    @staticmethod
    def scaled(cfg: SaltConfig, n: int) -> int:
        """k: how many of n singular values get a scale and a shift."""
        return max(1, int(n * cfg.scale_ratio)) if cfg.scale_rank is None else min(cfg.scale_rank, n)

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        u, s, vh = top_svd(weight(), min(t.op.shape), method="full")
        for buffer, value in ((t.U, u), (t.S, s), (t.V, vh)):
            buffer.copy_(value)
        t.scale.fill_(1.0)
        if not t.cfg.init_weights:
            nn.init.normal_(t.scale, mean=1.0, std=0.1)
        if t.X is not None:
            self.start_tail(t)

    @staticmethod
    def start_tail(t: View) -> None:
        if t.cfg.init_x == "kaiming":
            bound = math.sqrt(6 / t.r)
            nn.init.uniform_(t.X, -bound, bound)
        else:
            nn.init.normal_(t.X, std=0.01)
        if t.cfg.init_y == "normal" or not t.cfg.init_weights:
            nn.init.normal_(t.Y, std=0.01)

    def factors(self, t: View) -> Factors:
        k, u, v = len(t.scale), t.U if t.scaling == 1.0 else t.U * t.scaling, t.V
        if t.X is None:
            return Factors(v, u * self.top(t))
        if t.cfg.relu_mode == "none":
            # rank k + q instead of n
            return Factors(torch.cat((v[:k], t.Y @ v[k:])), torch.cat((u[:, :k] * self.top(t), u[:, k:] @ t.X), dim=1))
        return Factors(v, torch.cat((u[:, :k] * self.top(t), u[:, k:] @ self.tail(t)), dim=1))

    def whole(self, t: View, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor | None:
        """Over W + delta where that is exact and n rows or more make up for n-wide factors becoming a matrix."""
        thin = t.X is not None and t.cfg.relu_mode == "none"
        if thin or dropout > 0.0 or not takes_the_sum(x) or x.numel() // x.shape[-1] < min(t.op.shape):
            return None
        return dense_linear(x, weight, bias, self.delta_weight(t))

    @staticmethod
    def top(t: View) -> Tensor:
        """(k,) what the first k entries of C's diagonal add to S."""
        s = t.S[: len(t.scale)]
        moved = t.scale * s + t.shift
        return (moved if t.cfg.relu_mode == "none" else moved.relu()) - s

    @staticmethod
    def tail(t: View) -> Tensor:
        """What the (n - k, n - k) block adds to diag(S_tail), after relu on all of it or on its diagonal."""
        s = t.S[len(t.scale) :]
        block = t.X @ t.Y
        diagonal = (s + block.diagonal()).relu() - s
        rest = block.relu() if t.cfg.relu_mode == "all" else block
        return torch.diagonal_scatter(rest, diagonal)

    def adds_loss(self, cfg: SaltConfig) -> bool:
        return cfg.reg_weight > 0.0

    def extra_loss(self, views: Sequence[View]) -> Tensor:
        """reg_weight times the sum over layers of ||alpha S_top + beta - S_top|| + ||X Y||_F."""
        return views[0].cfg.reg_weight * torch.stack([self.distance(t) for t in views]).sum()

    @staticmethod
    def distance(t: View) -> Tensor:
        """||alpha S_top + beta - S_top|| + ||X Y||_F of one layer."""
        s = t.S[: len(t.scale)]
        moved = (t.scale - 1.0) * s + t.shift
        size = torch.linalg.vector_norm(moved)
        return size if t.X is None else size + torch.linalg.vector_norm(t.X @ t.Y)


@adapter(Salt())
@dataclass
class SaltConfig(AtlasConfig):
    """SALT. The official training also unfreezes LayerNorms and position embeddings: name them in `modules_to_save`.

    `reg_weight` needs `loratlas.attach` or `LifecycleCallback`.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(8, "Rank q of the update X Y of the tail block.")
    scale_rank: int | None = knob(None, "Singular values that get a scale and a shift; None: by scale_ratio.")
    scale_ratio: float = knob(0.1, "Share of the singular values that get a scale and a shift, at least one.")
    relu_mode: str = knob(
        "all", "relu on 'all' entries of the core (the official code), on its diagonal ('diag') or nowhere ('none')."
    )
    init_x: str = knob("kaiming", "X: 'kaiming' (U(+-sqrt(6 / q)), code for SAM2) or 'normal' (0.01 N(0, 1), for SAM).")
    init_y: str = knob("zeros", "Y: 'zeros' keeps the function; 'normal' (0.01 N(0, 1), code for SAM) does not.")
    reg_weight: float = knob(0.0, "Weight of the distance from the start in the loss; officially 0 or 0.01.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.scale_rank is None or self.scale_rank >= 1, "scale_rank", "at least 1")
        self._require(0.0 < self.scale_ratio <= 1.0, "scale_ratio", "in (0, 1]")
        self._require(self.relu_mode in ("all", "diag", "none"), "relu_mode", "'all', 'diag' or 'none'")
        self._require(self.init_x in ("kaiming", "normal"), "init_x", "'kaiming' or 'normal'")
        self._require(self.init_y in ("zeros", "normal"), "init_y", "'zeros' or 'normal'")
        self._require(self.reg_weight >= 0.0, "reg_weight", "at least 0")
