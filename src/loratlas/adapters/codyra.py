"""CoDyRA (arXiv 2412.01004): a stream of tasks, each learned with no more rank than it needs, for less forgetting.

    y = x W^T + x H_A^T H_B^T + ((x A^T) * g) B^T,      A (r, in), B (out, r), g (r,); scaling 1

    step t = 0 .. T-1 of a task:   after the optimizer, once t is past the dense part, g <- T_kappa(t)(g)
    next task:                     pairs with g != 0 join H, frozen; A, B and g start again

kappa(t) rises in steps from 0 to max_threshold (see `engine.gates` for T). H holds what earlier tasks have left, so
that W itself is never written. `next_task` goes on to the next task, `task_stream.learn_tasks` runs a whole stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loratlas.engine import pairs, rank_log
from loratlas.engine.config import knob
from loratlas.engine.factors import Factors
from loratlas.engine.gates import GatedConfig, GatedMethod, live_pairs, live_ranks
from loratlas.engine.lifecycle import StepContext, attach, is_attached
from loratlas.engine.method import View
from loratlas.engine.model import atlas_layers
from loratlas.engine.phases import start_again
from loratlas.engine.registry import adapter
from loratlas.engine.sharded import whole, write_
from loratlas.errors import UserError

_MERGE = ("earlier_tasks='merge'", "earlier_tasks='stack'")  # the option and what works without it, for messages


class CoDyRA(GatedMethod):
    """Beside the gated pairs: HA (h, in) and HB (out, h), the pairs that earlier tasks have kept, and their number."""

    name = "codyra"
    buffers = (*GatedMethod.buffers, *pairs.HISTORY, "tasks")
    growing = (*GatedMethod.growing, *pairs.HISTORY)
    derived = ("folded",)

    def shapes(self, cfg: CoDyRAConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(cfg, r, n_in, n_out), "HA": (0, n_in), "HB": (n_out, 0), "tasks": ()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {**super().dtypes(), "tasks": torch.int64}

    def factors(self, t: View) -> Factors:
        return pairs.add_history(t, super().factors(t))

    def exported(self, t: View) -> Factors:
        return pairs.add_history(t, live_pairs(t, t.scaling))

    def working(self, t: View) -> tuple[Tensor, Factors] | None:
        return None if t.folded is None else (t.folded, super().factors(t))

    def derive(self, t: View, weight: Callable[[], Tensor]) -> None:
        if t.cfg.earlier_tasks == "merge" and t.HA.shape[0]:
            pairs.fold(t, weight, *_MERGE)

    # -------------------------------------------------------------------------------------------------- training

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        if not ctx.total_steps:
            raise UserError(
                "CoDyRA raises its threshold over the whole of a task: pass attach(..., total_steps=N) or use a "
                "Trainer."
            )
        for t in views if views[0].cfg.earlier_tasks == "merge" else ():
            pairs.refuse_sharded_base(t, *_MERGE)

    def threshold(self, cfg: CoDyRAConfig, step: int, total: int) -> float:
        """kappa after step `step` (from 1) of `total`; 0 in the dense part, whose length is counted from 0."""
        done, dense = step - 1, cfg.dense_fraction * total
        if done <= dense:
            return 0.0
        # fewer steps than thresholds: the official code would never raise it
        levels = max(2, min(cfg.threshold_steps, int(total - dense)))
        interval = max(1, int((total - dense) // levels))
        raised = done // interval - (math.ceil(dense) - 1) // interval
        return cfg.max_threshold * min(raised, levels - 1) / (levels - 1)

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        self.shrink(views, ctx, self.threshold(views[0].cfg, ctx.step, ctx.total_steps))


@torch.no_grad()
def next_task(model: nn.Module, optimizer: Optimizer | None = None, adapter_name: str = "default") -> dict[str, int]:
    """Archive what the adapter has learned and let it start again; the model's function stays what it is.

    Pairs with an open gate become part of the frozen history, the others are dropped. The new start follows from the
    config's seed and the number of the task. All tensors are written in place.

    Args:
        model: a PEFT model with a CoDyRA adapter, or any module that contains it.
        optimizer: the one of the task before, if the next task uses it again: it forgets its state, and `attach` has
            to be called again. None: a new optimizer is built for the next task.

    Returns:
        {module path: rank that the task has left there}.

    Raises:
        UserError: no such adapter, or it is merged into the weights.
    """
    found = [(path, layer) for path, layer in atlas_layers(model, adapter_name) if isinstance(layer.method, CoDyRA)]
    if not found:
        raise UserError(f"the model has no CoDyRA adapter {adapter_name!r}: make it with CoDyRAConfig.")
    if any(adapter_name in layer.merged_adapters for _, layer in found):
        raise UserError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before the next task.")
    views = [layer.view(adapter_name) for _, layer in found]
    ranks = live_ranks(views).tolist()
    generator = torch.Generator().manual_seed(views[0].cfg.seed * 1_000_003 + int(views[0].tasks) + 1)
    for t in views:
        gate = whole(t.gates.detach())
        live = gate.nonzero().flatten()
        pairs.archive(t, whole(t.A.detach())[live], whole(t.B.detach())[:, live] * gate[live])
        _restart(t, generator)
        t.layer.derive(adapter_name)
    if optimizer is not None:
        start_again(optimizer)
        if is_attached(optimizer):
            attach(model, optimizer).remove()
    return {path: rank for (path, _), rank in zip(found, ranks, strict=True)}


def _restart(t: View, generator: torch.Generator) -> None:
    """The start of `GatedMethod.init` with draws that are the same on every rank, and a new count of steps."""
    a, gate = torch.empty(t.A.shape), torch.empty(t.gates.shape)
    nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
    nn.init.normal_(gate, generator=generator)
    write_(t.A, a.to(t.A))
    write_(t.B, torch.zeros(t.B.shape).to(t.B))
    write_(t.gates, (torch.ones_like(gate) if t.cfg.gate_init == "ones" else gate).to(t.gates))
    t.tasks.add_(1)
    t.step.zero_()
    t.total_steps.zero_()
    rank_log.note(t, 0, t.r)


@adapter(CoDyRA())
@dataclass
class CoDyRAConfig(GatedConfig):
    """CoDyRA. Training needs `loratlas.attach(model, optimizer, total_steps=N)` for every task, or `LifecycleCallback`.

    r is the most that a layer can keep of one task. Train with betas (0.9, 0.9999), a cosine schedule without warm-up
    and no weight decay to be as the paper; `task_stream.learn_tasks` does.

    Raises:
        UserError: a field is out of its range.
    """

    r: int = knob(16, "Pairs that a layer starts every task with.")
    max_threshold: float = knob(0.005, "kappa: the threshold that a task ends with, absolute.")
    threshold_steps: int = knob(50, "Thresholds from 0 to max_threshold, evenly spaced.")
    dense_fraction: float = knob(0.5, "Share of a task's steps before the first threshold.")
    earlier_tasks: str = knob(
        "stack",
        "Pairs of earlier tasks: 'stack' evaluates them beside the live ones; 'merge' trains over a dense working copy "
        "of W that has them (more memory, faster after many tasks). W itself is not written.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.max_threshold >= 0.0, "max_threshold", "at least 0")
        self._require(self.threshold_steps >= 2, "threshold_steps", "at least 2")
        self._require(0.0 <= self.dense_fraction <= 1.0, "dense_fraction", "in [0, 1]")
        self._require(self.earlier_tasks in ("stack", "merge"), "earlier_tasks", "'stack' or 'merge'")
