"""LoLDU: train the diagonal of a weight's LDU factorisation (arXiv 2410.13618, official code read).

    W = P L diag(D) U,      W' = W + s P L_r diag(z - z0) U_r,      z trained, z = z0 at the start,      s = alpha / r

P L U is LU with row pivoting, D its pivots; L_r and U_r are the first r columns and rows in the order of the pivots,
which is not one of importance. r numbers a layer train, with `train_scale` one more: s P L_r diag(gain z - z0) U_r.

The official code forms W - s P L_r diag(z0) U_r and adds the trained product. That is the same function, but for its
starts 'zeros', 'ones', 's_uniform' and 's_normal' it takes out another product than it puts back, which destroys the
model. Here every start is exactly W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratlas.engine.config import knob
from loratlas.engine.diagonal import DiagonalConfig, DiagonalMethod
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.linalg.ldu import LDU, ldu

STARTS = ("lu", "uniform", "normal", "constant", "zeros", "ones", "s_uniform", "s_normal")


class LoLDU(DiagonalMethod):
    """Tensors beside the bases: z (r,) and, with train_scale, gain () trained; z0 (r,) the start of z."""

    name = "loldu"
    params = ("z", "gain")
    buffers = (*DiagonalMethod.buffers, "z0")

    def shapes(self, cfg: LoLDUConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        gain: dict[str, tuple[int, ...]] = {"gain": ()} if cfg.train_scale else {}
        return {"z": (r,), "z0": (r,), **gain, **super().shapes(cfg, r, n_in, n_out)}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        matrix, most = weight(), min(t.op.shape)
        if t.r > most:
            return most
        factors = ldu(matrix)
        self.place(t, *leading(factors, t.r), matrix)
        t.z0.copy_(start(t.cfg.init_method, factors.diagonal[: t.r], t.cfg.seed))
        t.z.copy_(t.z0)
        if t.gain is not None:
            t.gain.fill_(1.0)
        if not t.cfg.init_weights:
            t.z.add_(torch.randn_like(t.z))
        return None

    def bases(self, t: View, weight: Tensor) -> tuple[Tensor, Tensor]:
        return leading(ldu(weight), t.r)

    def diagonal(self, t: View) -> Tensor:
        return (t.z if t.gain is None else t.gain * t.z) - t.z0


def leading(factors: LDU, r: int) -> tuple[Tensor, Tensor]:
    """P L_r (out, r) and U_r (r, in)."""
    return factors.left()[:, :r].contiguous(), factors.upper[:r].contiguous()


def start(method: str, pivots: Tensor, seed: int) -> Tensor:
    """z0 (r,) for the first r pivots D_r, m their mean.

    lu: D_r. uniform: U(-|m|/2, |m|/2). normal: N(m, std D_r). constant: m. zeros, ones. s_uniform: U(-1, 1).
    s_normal: N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(pivots.shape, generator=generator).to(pivots) * 2.0 - 1.0
    normal = torch.randn(pivots.shape, generator=generator).to(pivots)
    mean = pivots.mean()
    starts = {
        "lu": pivots,
        "uniform": uniform * mean.abs() / 2.0,
        "normal": mean + normal * pivots.std(correction=min(1, pivots.numel() - 1)),
        "constant": mean.expand_as(pivots),
        "zeros": torch.zeros_like(pivots),
        "ones": torch.ones_like(pivots),
        "s_uniform": uniform,
        "s_normal": normal,
    }
    return starts[method]


@adapter(LoLDU())
@dataclass
class LoLDUConfig(DiagonalConfig):
    """LoLDU. Train with a rate for single numbers, larger than LoRA's.

    Raises:
        UserError: a field is out of its range.
    """

    r: int | None = knob(  # type: ignore[assignment]
        None, "Diagonal entries that train in a layer; None: all min(out, in), as in the paper."
    )
    lora_alpha: float | None = knob(None, "Numerator of the scaling s = alpha / r; None means alpha = r, s = 1.")
    init_method: str = knob(
        "uniform",
        "Start of z: 'lu' (D), 'uniform', 'normal', 'constant' (by D's mean), 'zeros', 'ones', 's_uniform', "
        "'s_normal'. Every start is exactly W; it matters with weight decay and train_scale only.",
    )
    train_scale: bool = knob(False, "Train a factor of the scaling too, one number a layer (the paper's figure 2).")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.init_method in STARTS, "init_method", f"one of {', '.join(STARTS)}")
