"""TriAdaptLoRA (arXiv 2501.08008): a core of two triangles that grows by a row and a column with every rank.

    delta = s r / (R + 1e-5) * B C A,     C = L + U (R x R)     L: | x . . |    U: | x x x |
                                                                   | x x . |       | . x x |
                                                                   | x x x |       | . . x |

    in a round:   F = ||C||_F / N;  the K modules whose F has risen most since the last round gain ranks, with
                  K = (budget left) * p,    p: the part of the run since the warm-up,       see `engine.growing`

The diagonal is in both triangles. The score needs no gradient and costs nothing but in rounds. Ranks added together
may form one block, as they do in all variants but "single": the diagonal blocks then are square and in both triangles.
N is the number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratlas.engine import slots
from loratlas.engine.config import knob
from loratlas.engine.factors import Factors
from loratlas.engine.growing import STD, GrowingConfig, GrowingMethod, Plan
from loratlas.engine.lifecycle import StepContext
from loratlas.engine.method import View
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import put_, whole

VARIANTS = ("single", "c0", "eye")


class TriAdaptLora(GrowingMethod):
    """Tensors: L, U (r_max, r_max), of which the triangles count; a slot is a row of L and a column of U. Buffers,
    beside those of `engine.growing`: block (r_max,), the block that a slot belongs to; norm (), F of the last round."""

    name = "triadaptlora"
    params = ("A", "B", "L", "U")
    buffers = (*GrowingMethod.buffers, "block", "norm")
    schedule = (*GrowingMethod.schedule, "total_step")

    def dtypes(self) -> dict[str, torch.dtype]:
        return {**super().dtypes(), "block": torch.int64}

    def shapes(self, cfg: TriAdaptLoraConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        own = super().shapes(cfg, r, n_in, n_out)
        (room,) = own["born"]
        return {**own, **dict.fromkeys(("L", "U"), (room, room)), "block": (room,), "norm": ()}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        rank = self.start(t)
        t.block[:rank] = torch.arange(rank) if t.cfg.init_variant == "single" else 0
        if t.cfg.init_weights is False:
            nn.init.kaiming_uniform_(t.A[:rank], a=5**0.5)
            nn.init.kaiming_uniform_(t.B[:, :rank], a=5**0.5)
            t.L[:rank].fill_diagonal_(1.0)
        elif t.cfg.init_variant == "single":
            t.L[:rank].normal_(std=STD)
            t.U[:, :rank].normal_(std=STD)
        elif t.cfg.init_variant == "c0":
            t.B[:, :rank].normal_(std=STD)
        else:
            t.L[:rank].fill_diagonal_(1.0)
            t.U[:, :rank].fill_diagonal_(1.0)
        t.norm.copy_(self.size(t))
        return None

    def factors(self, t: View) -> Factors:
        with torch.autocast(t.A.device.type, enabled=False):
            return Factors(t.A, t.B @ (core(t, t.L, t.U) * self.share(t)))

    # ------------------------------------------------------------------------------------------------- the schedule

    def cadence(self, views: Sequence[View], budget: int, warmup: int, total_steps: int) -> tuple[int, int]:
        return views[0].cfg.incre_interval or max(1, total_steps // 20), len(views)

    def chosen(self, cfg: TriAdaptLoraConfig, plan: Plan, g: int, left: int, total_steps: int) -> int:
        p = (g - plan.warmup) / max(1, (cfg.total_step or total_steps) - plan.warmup)
        wanted = left * p if cfg.rank_growth == "linear" else math.exp(p * math.log(left))
        return min(max(1, int(wanted)), plan.most)

    def size(self, t: View) -> Tensor:
        """F = ||C||_F / N of the layer."""
        blocks = t.block[t.rank - 1] + 1
        return core(t, whole(t.L.detach()), whole(t.U.detach())).norm() / blocks

    def scores(self, views: Sequence[View]) -> Tensor:
        """How much F has changed since the last round; whether a module then grows or not, it is measured anew."""
        sizes = torch.stack([self.size(t) for t in views])
        change = sizes - torch.stack([t.norm for t in views])
        torch._foreach_copy_([t.norm for t in views], list(sizes.unbind()))
        return change

    # --------------------------------------------------------------------------------------------------- the steps

    def slotted(self, t: View) -> Sequence[tuple[Tensor, int, Tensor]]:
        return [*super().slotted(t), (t.L, 0, t.born), (t.U, 1, t.born)]

    def grow(self, t: View, gain: int, ctx: StepContext, generator: torch.Generator) -> None:
        last = t.block[t.rank - 1].clone()
        new = slots.wake(t, gain, ctx)
        own, variant = torch.arange(gain, device=new.device), t.cfg.init_variant
        t.block[new] = last + 1 + (own if variant == "single" else torch.zeros_like(own))
        slots.fill(t.A, 0, new, STD, generator)
        if variant == "eye":
            rows = torch.eye(gain, len(t.born), dtype=t.L.dtype, device=new.device)
            put_(t.L, 0, new, rows)
            put_(t.U, 1, new, rows.T)
            return
        slots.fill(t.B, 1, new, STD, generator)
        if variant == "single":
            slots.fill(t.L, 0, new, STD, generator)
            slots.fill(t.U, 1, new, STD, generator)


def core(t: View, lower: Tensor, upper: Tensor) -> Tensor:
    """C (r_max, r_max) of the tensors L and U: their triangles by blocks, zero outside the live slots."""
    live = slots.alive(t)
    mask = (t.block <= t.block[:, None]) * (live * live[:, None])
    return lower * mask + upper * mask.T


@adapter(TriAdaptLora())
@dataclass
class TriAdaptLoraConfig(GrowingConfig):
    """TriAdaptLoRA. Training needs `loratlas.attach(model, optimizer, total_steps=N)` or `LifecycleCallback` in a
    Trainer; without it every module stays at rank init_r.

    Raises:
        UserError: a field is out of its range.
    """

    incre_interval: int | None = knob(None, "Steps from round to round; None: a twentieth of the run.")
    orth_reg_weight: float = knob(0.5, "Weight of the penalty that keeps the rows of A and columns of B orthonormal.")
    rank_growth: str = knob(
        "linear", "How the number of modules that grow rises with p: 'linear' (the paper's best) or 'exponential'."
    )
    init_variant: str = knob(
        "single",
        "What starts at random: 'single': all but B, and all of a new rank. 'c0': A and B, with C = 0, so that growth "
        "only rescales. 'eye': A, with identities in both triangles.",
    )
    total_step: int | None = knob(None, "Steps over which p goes from 0 to 1; None: those of the run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.rank_growth in ("linear", "exponential"), "rank_growth", "'linear' or 'exponential'")
        self._require(self.init_variant in VARIANTS, "init_variant", f"one of {', '.join(VARIANTS)}")
        self._require(self.total_step is None or self.total_step >= 1, "total_step", "at least 1")
