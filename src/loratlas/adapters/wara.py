"""WaRA: a low-rank map in the wavelet domain, the same for both bands (arXiv 2506.24092, version 1).

    W' = W + s (P_L^T B A P_L + P_H^T B A P_H)        A (r, in / 2),  B (out / 2, r),  rank 2 r

P_L and P_H, of the input's and the output's size, are the low and high half of a one-level orthonormal wavelet
transform of the features. The paper transforms along the tokens as well; as B A does not touch them, that cancels. No
official code is known.

For haar the update is the Kronecker product (B A) (x) I_2, without a trace of wavelets; longer filters do more. The
factors are transformed, not the activations: down = [A P_L; A P_H], up = [P_L^T B, P_H^T B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.factors import Factors
from loratlas.engine.method import LowRankMethod, View
from loratlas.engine.registry import adapter
from loratlas.errors import UserError
from loratlas.linalg.wavelets import filters, synthesise


class WaRA(LowRankMethod):
    """Tensors: A (r, in / 2), B (out / 2, r); without shared_bands also A_high and B_high for the high band."""

    name = "wara"
    params = ("A", "B", "A_high", "B_high")

    def shapes(self, cfg: WaRAConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        if n_in % 2 or n_out % 2:
            raise UserError(
                f"its {n_out} x {n_in} weight has an odd side, which a wavelet transform cannot halve: leave the "
                "module out of target_modules."
            )
        a, b = (r, n_in // 2), (n_out // 2, r)
        return {"A": a, "B": b} if cfg.shared_bands else {"A": a, "B": b, "A_high": a, "B_high": b}

    def init(self, t: View, weight: Callable[[], Tensor]) -> None:
        for down, up in ((t.A, t.B), (t.A_high, t.B_high)):
            if down is not None:
                nn.init.kaiming_uniform_(down, a=5**0.5)
                if not t.cfg.init_weights:
                    nn.init.normal_(up, std=0.1)

    def factors(self, t: View) -> Factors:
        low, high = filters(t.cfg.wavelet)
        a_high, b_high = (t.A, t.B) if t.A_high is None else (t.A_high, t.B_high)
        down = torch.cat((synthesise(t.A, low), synthesise(a_high, high)))
        up = torch.cat((synthesise(t.B.T, low), synthesise(b_high.T, high))).T
        return Factors(down, up if t.scaling == 1.0 else up * t.scaling)


@adapter(WaRA())
@dataclass
class WaRAConfig(AtlasConfig):
    """WaRA. What the paper's first version leaves open (wavelet, start, scaling) is an option here.

    Raises:
        UserError: a field is out of its range, or the wavelet needs PyWavelets (`loratlas[wavelet]`).
    """

    r: int = knob(8, "Rank r of the map of a band; the update has rank 2 r.")
    wavelet: str = knob(
        "haar", "An orthogonal wavelet: 'haar' and 'db2' are built in, other db, sym and coif need PyWavelets."
    )
    shared_bands: bool = knob(True, "One map for both bands; False (ours): one for each, with twice the parameters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            filters(self.wavelet)
        except UserError as error:
            raise UserError(f"WaRAConfig: wavelet: {error}", field="wavelet") from None
