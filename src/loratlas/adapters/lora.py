"""LoRA, its PiSSA and its FILA start: the baselines of everything.

LoRA (arXiv 2106.09685):     W' = W + s B A,                 A ~ kaiming uniform, B = 0
PiSSA (arXiv 2404.02948):    W' = W + s (B A - B* A*),       s B* A* = the top-r part of the SVD of W

FILA (arXiv 2408.06621):     the same, s B* A* = the best rank-r part of W with rows weighted (see `fila`)

The papers of PiSSA and FILA move s B* A* out of W. Here W stays as it is and the update is kept in difference form (see
`engine.pairs`): the same function and the same gradients, exact on disable, on reload and on quantised bases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from loratlas.adapters.fila import FILA, fila_start
from loratlas.engine import pairs
from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.method import RELATIVE_FISHER, LowRankMethod, View
from loratlas.engine.registry import adapter
from loratlas.linalg.factorise import usable_svd

DIFFERENCES = ("pissa", *FILA)  # the starts that are kept in difference form


class Lora(LowRankMethod):
    name = "lora"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv2d", "embedding")
    params = pairs.TENSORS
    buffers = pairs.STARTS

    def scale(self, cfg: AtlasLoraConfig, r: int, alpha: float | None) -> float:
        if alpha is None:
            return 1.0
        return alpha / (r**0.5 if cfg.use_rslora else r)

    def shapes(self, cfg: AtlasLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        every = pairs.shapes(r, n_in, n_out)
        return every if cfg.init_weights in DIFFERENCES else {name: every[name] for name in pairs.TENSORS}

    def gather(self, cfg: AtlasLoraConfig) -> tuple[str, ...]:
        return (RELATIVE_FISHER,) if cfg.init_weights in FILA else ()

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        if t.cfg.init_weights in FILA and t.statistics[RELATIVE_FISHER].any():
            return fila_start(t, weight())
        if t.cfg.init_weights == "pissa":
            u, s, vh = usable_svd(weight(), t.r, **t.cfg.svd_options())
            if len(s) < t.r:
                return len(s)
            pairs.start(t, *pairs.principal_factors(u, s, vh, t.scaling))
        else:
            random_start(t.A, t.B, embedding=t.op.kind == "embedding", identity=bool(t.cfg.init_weights))
            if t.cfg.init_weights in FILA:  # no importance reached the layer: LoRA's own start
                pairs.start(t, t.A, t.B)
        return None

    def factors(self, t: View) -> Factors:
        return pairs.difference(t)

    def pair(self, t: View) -> tuple[nn.Parameter, nn.Parameter]:
        return t.A, t.B


def random_start(a: Tensor, b: Tensor, *, embedding: bool, identity: bool) -> None:
    """LoRA's start from torch's global generator: for the same seed the very start of PEFT's LoRA.

    PEFT builds whole layers, which draw once, and then draws again for the start; the same draws are made here in the
    same order. In an embedding A is the zero factor, or the rows that are never looked up would stay random for ever.
    With identity False neither factor is zero.
    """
    draw = nn.init.normal_ if embedding else partial(nn.init.kaiming_uniform_, a=5**0.5)
    draw(a)
    draw(b)
    if identity:
        draw(b if embedding else a)
        nn.init.zeros_(a if embedding else b)


@adapter(Lora())
@dataclass
class AtlasLoraConfig(SvdConfig):
    """Plain LoRA on the engine, with PiSSA's start as an option.

    Scaling s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). The defaults are those of PEFT's
    LoraConfig, r = 8 and lora_alpha = 8; lora_alpha None means s = 1.

    Raises:
        UserError: a field is out of its range.
    """

    lora_alpha: float | None = knob(8, "Numerator of the scaling alpha / r, as in PEFT; None means a scaling of 1.")
    init_weights: bool | str = knob(
        True,
        "True: A kaiming uniform, B zero. 'pissa': top-r singular directions of W. 'fila': those that matter to what "
        "shall be forgotten, after `loratlas.relative_fisher`; 'fila-code': by the official code's SVD. False: both "
        "random (for tests).",
    )
    use_rslora: bool = knob(False, "Scale by alpha / sqrt(r) instead of alpha / r.")

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = (True, False, *DIFFERENCES)
        self._require(self.init_weights in starts, "init_weights", "True, False, 'pissa', 'fila' or 'fila-code'")
