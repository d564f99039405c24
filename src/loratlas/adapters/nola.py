"""NOLA (arXiv 2310.02556): LoRA's factors as combinations of seeded random matrices; only the coefficients train.

    W' = W + s B A,      A = A0 + sum_i a_i A_i  (r, in),      B = sum_j b_j B_j  (out, r),      a = b = 0 at the start

A0 is LoRA's random start, uniform within 1 / sqrt(in); the entries of A_i and B_j are uniform within 1 / sqrt(k). All
of them are drawn from seeds that follow from the config's seed and the module's name, and none is saved: an adapter's
file holds k_A + k_B coefficients and three seeds a layer, whatever r and the layer's width.

The variant "vit" (NOLA2 of the official code) has no A0, bases within 1 / sqrt(in r) and 1 / sqrt(r out), and
coefficients that start at 1 / k: its update is not zero at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.registry import adapter
from loratlas.linalg.seeded import Bases, Stream, combine, seed_of


class Nola(LowRankMethod):
    """Tensors: coef_A (k_A,), coef_B (k_B,) trained; seeds, int64, of the bases of A, of those of B and of A0.

    probe (8,) stands for the generator: its fingerprint in a file says whether seeds mean the same numbers here.
    """

    name = "nola"
    kinds = ("linear", "conv1d", "conv2d")
    params = ("coef_A", "coef_B")
    buffers = ("seeds",)
    derived = ("A0", "bases_A", "bases_B", "drawn")
    shared = ("probe",)

    def scale(self, cfg: NolaConfig, r: int, alpha: float | None) -> float:
        return 1.0 / r if cfg.variant == "vit" and alpha is None else super().scale(cfg, r, alpha)

    def shapes(self, cfg: NolaConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"coef_A": (cfg.num_basis,), "coef_B": (cfg.num_basis_b or cfg.num_basis,), "seeds": (3,)}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"seeds": torch.int64}

    def make_shared(self, cfg: NolaConfig, sizes: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        return {"probe": Stream(seed_of(cfg.seed)).uniform((8,))}

    def drawn_again(self, cfg: NolaConfig) -> tuple[str, ...]:
        return self.shared

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        if t.r > min(t.op.shape):
            return min(t.op.shape)
        names = ("A", "B", "A0")
        t.seeds.copy_(torch.tensor([seed_of(t.cfg.seed, t.layer.path, name) for name in names]))
        for coefficients in (t.coef_A, t.coef_B):
            if not t.cfg.init_weights:
                nn.init.normal_(coefficients)
            elif t.cfg.variant == "vit":
                coefficients.fill_(1.0 / len(coefficients))
        return None

    def derive(self, t: View, weight: Callable[[], Tensor]) -> None:
        # on meta nothing is known; all zero: the file is still to be read
        if t.seeds.is_meta or not t.seeds.any() or (t.drawn is not None and torch.equal(t.drawn, t.seeds)):
            return
        made, place = {"drawn": t.seeds.clone()}, t.coef_A.device
        if t.cfg.variant == "lm":
            n_in = t.op.shape[1]
            made["A0"] = Stream(int(t.seeds[2])).uniform((t.r, n_in), n_in**-0.5).to(place)
        if t.cfg.keep_bases:
            of_a, of_b = self.bases(t)
            made |= {"bases_A": of_a.whole().to(place), "bases_B": of_b.whole().to(place)}
        for name, value in made.items():
            t.layer.store(name)[t.adapter] = value

    def bases(self, t: View) -> tuple[Bases, Bases]:
        """Those of A and of B; of the variant "vit" they are transposed, (in, r) and (r, out)."""
        n_out, n_in = t.op.shape
        of_a, of_b, _ = t.seeds.tolist()
        k_a, k_b = len(t.coef_A), len(t.coef_B)
        if t.cfg.variant == "vit":
            bounds = ((n_in * t.r) ** -0.5, (t.r * n_out) ** -0.5)
            return Bases(of_a, k_a, (n_in, t.r), bound=bounds[0]), Bases(of_b, k_b, (t.r, n_out), bound=bounds[1])
        over = (k_a**0.5, k_b**0.5) if t.cfg.basis_scale == "inv_sqrt_k" else (1.0, 1.0)
        return Bases(of_a, k_a, (t.r, n_in), divisor=over[0]), Bases(of_b, k_b, (n_out, t.r), divisor=over[1])

    def factors(self, t: View) -> Factors:
        with torch.autocast(t.coef_A.device.type, enabled=False):
            of_a, of_b = self.bases(t)
            a, b = _sum(t.coef_A, t.bases_A, of_a), _sum(t.coef_B, t.bases_B, of_b)
            if t.cfg.variant == "vit":
                return Factors(down=a.T, up=b.T * t.scaling)
            return Factors(down=t.A0 + a, up=b * t.scaling)


def _sum(coefficients: Tensor, kept: Tensor | None, bases: Bases) -> Tensor:
    # an adapter that trains in half precision still adds up its k terms in fp32
    coefficients = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    if kept is None:
        return combine(coefficients, bases)
    return (coefficients @ kept.to(coefficients.dtype)).view(bases.shape)


@adapter(Nola())
@dataclass
class NolaConfig(AtlasConfig):
    """NOLA. Train with weight decay 0 and a learning rate about ten times LoRA's.

    Raises:
        UserError: a field is out of its range.
    """

    num_basis: int = knob(128, "k, random matrices that A is a combination of: so many numbers train in a layer for A.")
    num_basis_b: int | None = knob(None, "The same of B; None means as many as for A.")
    basis_scale: str = knob(
        "inv_sqrt_k", "Size of the random entries: 'inv_sqrt_k' (the official code's) or 'one' (its README's)."
    )
    variant: str = knob("lm", "'lm': from LoRA's start. 'vit': NOLA2, no start, s = 1 / r where lora_alpha is None.")
    keep_bases: bool = knob(
        True,
        "Keep the random matrices in memory, k times what LoRA's factors take. False: draw them again in every forward "
        "and backward pass, which takes no memory and much longer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.num_basis >= 1, "num_basis", "at least 1")
        self._require(self.num_basis_b is None or self.num_basis_b >= 1, "num_basis_b", "at least 1 or None")
        self._require(self.basis_scale in ("inv_sqrt_k", "one"), "basis_scale", "'inv_sqrt_k' or 'one'")
        self._require(self.variant in ("lm", "vit"), "variant", "'lm' or 'vit'")
