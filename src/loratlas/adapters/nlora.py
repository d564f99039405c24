"""NLoRA, SLoRA and IntTune (arXiv 2502.14482): LoRA with a trained core, started from slices of the weight.

    W' = W + s B N A,      A = W[:r, :],   N = W[:r, :r],   B = W[:, :r]      (r (in + out) + r^2 parameters)

No SVD and no data: the start is a copy. With init_weights="pinv" N is the pseudo-inverse of the corner, Nystrom's
approximation of W as textbooks have it; with "slora" A and N are random and B is zero, as in LoRA. train="core" is
IntTune: the r^2 numbers of N train between fixed slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from loratlas.engine import cores
from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.cores import CoreMethod
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg.factorise import nystrom


class NLora(CoreMethod):
    name = "nlora"

    def frozen(self, cfg: NLoraConfig) -> tuple[str, ...]:
        return ("A", "B") if cfg.train == "core" else ()

    def keeps_start(self, cfg: NLoraConfig) -> bool:
        return cfg.init_weights == "pinv" or (cfg.residual and cfg.init_weights != "slora")

    def place(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        if t.cfg.init_weights == "slora":
            cores.random_start(t, identity=True)
            return None
        up, core, down = nystrom(weight(), t.r, pinv=t.cfg.init_weights == "pinv")
        if not (up.any() and down.any()):
            raise UserError(
                f"the first {t.r} rows or columns of its weight are all zero, so that slices of it would never get a "
                "gradient: use init_weights='slora', or exclude the module."
            )
        cores.start(t, up, core, down)
        return None


@adapter(NLora())
@dataclass
class NLoraConfig(AtlasConfig):
    """NLoRA. Defaults are the official code's, whose start changes the function a little: `residual` prevents that.

    Raises:
        UserError: a field is out of its range, or train='core' with a start whose B is zero and stays so.
    """

    init_weights: bool | str = knob(
        True,
        "True: slices of W, the corner as core (the paper's code). 'pinv': the corner's pseudo-inverse as core "
        "(textbook Nystrom). 'slora': random A and N, zero B. False: all random (for tests).",
    )
    residual: bool = knob(
        False,
        "Take s B N A of the start out of the update, so that the function starts as the base model's. Always so with "
        "'pinv', and not needed with 'slora'.",
    )
    train: str = knob("all", "'all': A, N and B. 'core': N alone (IntTune).")

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = (True, False, "pinv", "slora")
        self._require(self.init_weights in allowed, "init_weights", "True, False, 'pinv' or 'slora'")
        self._require(self.train in ("all", "core"), "train", "'all' or 'core'")
        possible = self.train == "all" or self.init_weights != "slora"
        self._require(possible, "train", "'all' with init_weights='slora', whose B is zero and would stay so")
