"""LT-SFT: sparse fine-tuning by lottery tickets (arXiv 2110.07560, official code read).

    dense phase    all of theta trains;  score_i = |theta_i - theta0_i|;  mu = the K largest;  theta goes back
    sparse phase   theta_i trains where mu_i, with a fresh optimizer and learning rate;  phi = theta - theta0

Whatever lies outside mu is exactly theta0 at the end, phi has K entries, and phis of one base add up: see
`sparse_delta`. A head trains in full in both phases and is kept whole.

    strategy = LtSftConfig(proportion=0.08).build()
    Trainer(model, ..., callbacks=[strategy])                   # plain loop: strategy.attach(model, optimizer, 1000)
    strategy.delta(model).save("task")
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from loratlas.engine.config import knob
from loratlas.engine.distributed import refuse_flat_parameters, torch_optimizer
from loratlas.engine.parts import StrategyConfig
from loratlas.engine.phases import Phases, start_again
from loratlas.errors import UserError
from loratlas.strategies.lottery import Tickets, tickets, unwrapped
from loratlas.strategies.sparse_delta import SparseDelta, base_fingerprint

log = logging.getLogger(__name__)

TIES = ("exact", "official")


@dataclass
class LtSftConfig(StrategyConfig):
    """Two phases, once or several times over. The model's own weights train; the result is a sparse delta.

    Raises:
        UserError: an option out of its range; in `check`, one that does not fit the model.
    """

    name: ClassVar[str] = "lt-sft"
    trains_base: ClassVar[bool] = True

    num_params: int | None = knob(None, "K: how many entries may change; None: the share `proportion`.")
    proportion: float = knob(0.01, "K as a share of all entries to choose from; the paper's runs have about 0.08.")
    n_iterations: int = knob(1, "How often the two phases run; each time an equal part of the K entries is chosen.")
    dense_share: float = knob(0.5, "Share of the steps that the dense phases take; paper: 3 of 13 epochs, or 5 of 10.")
    dense_steps: int | None = knob(None, "Steps of one dense phase, instead of dense_share.")
    l1_dense: float = knob(
        0.0, "Weight of mean |theta - theta0| in dense phases; paper: 0.1 for languages, 0 for tasks."
    )
    l1_sparse: float = knob(0.0, "The same in sparse phases.")
    maskable: str | None = knob(
        None, "Regular expression for parameters to choose from; None: the base model. Others train in full."
    )
    freeze: str | None = knob(None, "Regular expression for parameters that do not train, such as an output embedding.")
    freeze_layer_norm: bool = knob(True, "Leave LayerNorm and RMSNorm alone, as the paper's runs do.")
    ties: str = knob("exact", "Entries that moved exactly as far as the K-th: 'exact' (K in all) or 'official' (all).")

    def __post_init__(self) -> None:
        self._require(self.num_params is None or self.num_params >= 1, "num_params", "at least 1")
        self._require(0 < self.proportion <= 1, "proportion", "above 0 and at most 1")
        self._require(self.n_iterations >= 1, "n_iterations", "at least 1")
        self._require(0 < self.dense_share < 1, "dense_share", "between 0 and 1")
        self._require(self.dense_steps is None or self.dense_steps >= 1, "dense_steps", "at least 1")
        for name in ("l1_dense", "l1_sparse"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(self.ties in TIES, "ties", f"one of {', '.join(TIES)}")

    def check(self, model: nn.Module) -> None:
        self.count(self.tickets(model))

    def tickets(self, model: nn.Module) -> Tickets:
        """The parameters of `model` by what becomes of them; raises as `check`."""
        return tickets(model, self.maskable, self.freeze, self.freeze_layer_norm)

    def count(self, found: Tickets) -> int:
        """K. Raises `UserError` if there are fewer entries than that, or none."""
        k = int(self.proportion * found.size) if self.num_params is None else self.num_params
        what = f"at most {found.size}, the number of entries to choose from"
        self._require(k <= found.size, "num_params", what)
        self._require(k >= self.n_iterations, "proportion", f"at least {self.n_iterations} / {found.size}")
        return k

    def phases(self, total_steps: int) -> Phases:
        """Dense and sparse in turn. Raises `UserError` if one of them would have no step."""
        lengths: list[int] = []
        for steps in Phases.split(total_steps, self.n_iterations).lengths:
            dense = round(self.dense_share * steps) if self.dense_steps is None else self.dense_steps
            if not 0 < dense < steps:
                raise UserError(
                    f"LT-SFT needs steps for {2 * self.n_iterations} phases, but {total_steps} leave one without: "
                    "train longer, or change dense_steps, dense_share or n_iterations."
                )
            lengths += [dense, steps - dense]
        return Phases(tuple(lengths))

    def build(self) -> LtSftCallback:
        return LtSftCallback(self)


class LtSftCallback(TrainerCallback):
    """The two phases in a Trainer, or after `attach` in a plain loop.

    Right after the last step of a dense phase the entries are chosen and all parameters go back, so that what is
    evaluated or saved there is the start of the sparse phase.

    Attributes:
        step: optimizer steps done.
        k: entries that may change in all.
    """

    def __init__(self, cfg: LtSftConfig | None = None) -> None:
        self.cfg = cfg or LtSftConfig()
        self.step = self.k = 0
        self._total, self._skipped = 1, False
        self._tickets: Tickets | None = None
        self._phases = Phases((0,))
        self._base: dict[str, str] = {}
        self._state: dict[str, Any] | None = None
        self._handles: list[Any] = []

    # ------------------------------------------------------------------------------------------------------ a run

    def attach(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int | None = None, *, scheduler: Any = None
    ) -> LtSftCallback:
        """Begin, or go on after `load_state_dict`, with hooks of `optimizer.step`.

        Args:
            optimizer: built from all parameters that may train, before this.
            total_steps: optimizer steps of all phases.
            scheduler: of the learning rate, made for `total_steps`: every phase runs through the whole of its curve.

        Raises:
            UserError: no `total_steps`, an option that does not fit the model or run, an optimizer without some of the
                parameters or of a kind that cannot start again, a resumed run with another K or other phases.
        """
        if not total_steps:
            raise UserError("LT-SFT has to know where its phases end: pass total_steps to attach.")
        self.detach()
        self._optimizer = torch_optimizer(optimizer)
        refuse_flat_parameters(model, self._optimizer)
        start_again(self._optimizer, [])  # refuses now what could not at the end of a phase
        found, self._phases = self.cfg.tickets(model), self.cfg.phases(total_steps)
        self.k = self.cfg.count(found)
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not all(id(p) in held for p in found.trained.values()):
            raise UserError(
                "LT-SFT's optimizer does not hold all parameters that may train: build it from model.parameters()."
            )
        if self._state is None:
            self.step = 0
            found.begin()
            start = {name: found.start[name] for name in found.maskable}
            self._base = base_fingerprint(unwrapped(model), start)
        else:
            self._go_on(found, self._state)
        self._tickets, self._state = found, None
        self._total = sum(p.numel() for p in unwrapped(model).parameters())
        if scheduler is not None:
            self._phases.pace(scheduler, "each")
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        ]
        # here too, so that clipping, which comes before the step, sees the norm of what trains
        for name, p in found.maskable.items():
            self._handles.append(p.register_post_accumulate_grad_hook(self._masking(name)))
        return self

    def detach(self) -> None:
        """Leave the optimizer and the model alone; `delta` still works."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self._state is None:
            raise UserError(
                "the checkpoint holds neither the start nor the masks of LT-SFT: resume with a Trainer that has "
                "AtomicCheckpoints, from a checkpoint that one wrote."
            )
        self.attach(kwargs["model"], kwargs["optimizer"], state.max_steps, scheduler=kwargs.get("lr_scheduler"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    @property
    def sparse(self) -> bool:
        """Whether the next step belongs to a sparse phase."""
        return self._phases.at(self.step + 1) % 2 == 1

    def _masking(self, name: str) -> Any:
        def masked(p: Tensor) -> None:
            if self.sparse and self._tickets is not None:
                self._tickets.mask_gradient(name, p)

        return masked

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer drops such a step inside
        self._skipped = found is not None and float(found) != 0.0
        tickets = self._tickets
        if self._skipped or tickets is None:
            return
        for p in tickets.frozen.values():
            p.grad = None
        weight = self.cfg.l1_sparse if self.sparse else self.cfg.l1_dense
        if weight:
            self._pull(tickets, weight)
        if self.sparse:
            for name, p in tickets.maskable.items():
                tickets.mask_gradient(name, p)

    def _pull(self, tickets: Tickets, weight: float) -> None:
        """The gradient of weight / n * sum |p - theta0|, n as in the official code: all parameters of the model."""
        scale = getattr(self._optimizer, "grad_scale", None)
        for name, p in tickets.maskable.items():
            if p.grad is not None:
                slope = torch.sign(p - tickets.start[name])
                p.grad.add_(slope if scale is None else slope * scale, alpha=weight / self._total)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        tickets = self._tickets
        if self._skipped or tickets is None:
            return
        if self.sparse:
            tickets.hold()
        phase, self.step = self._phases.at(self.step + 1), self.step + 1
        if self.step >= self._phases.total or self._phases.at(self.step + 1) == phase:
            return
        if phase % 2 == 0:
            round_, rounds = phase // 2, self.cfg.n_iterations
            share = self.k * (round_ + 1) // rounds - self.k * round_ // rounds
            tickets.draw(share, self.cfg.ties == "official")
        else:
            tickets.dense()
        start_again(self._optimizer)

    # ---------------------------------------------------------------------------------------------------- results

    def delta(self, model: nn.Module) -> SparseDelta:
        """What training changed in `model`, relative to where it began.

        Raises:
            UserError: nothing was trained, the dense phase is not over, or `model` is one of a dense phase, as
                `load_best_model_at_end` may bring back.
        """
        tickets = self._drawn(model)
        if tickets is None:
            raise UserError(
                "LT-SFT has chosen no entries yet: train beyond the dense phase before you ask for the delta."
            )
        params = dict(unwrapped(model).named_parameters())
        indices, values = {}, {}
        for name, mask in tickets.masks.items():
            now, then = params[name].detach(), tickets.start[name]
            if not torch.equal(now[~mask], then[~mask]):
                raise UserError(
                    f"{name} has changed outside the mask, so this is the model of a dense phase: take one of a sparse "
                    "phase, and leave load_best_model_at_end off unless only those are saved."
                )
            index = mask.flatten().nonzero().flatten()
            precise = torch.float64 if now.dtype == torch.float64 else torch.float32
            moved = now.flatten()[index].to(precise) - then.flatten()[index].to(precise)
            index, moved = index[moved != 0], moved[moved != 0]
            if len(index):
                small = now.numel() < 2**31
                indices[name], values[name] = index.to("cpu", torch.int32 if small else torch.int64), moved.cpu()
        shapes = {name: tuple(params[name].shape) for name in indices}
        heads = {name: params[name].detach().cpu().clone() for name in tickets.whole}
        return SparseDelta(indices, values, shapes, heads, {name: self._base[name] for name in indices})

    def save_result(self, model: nn.Module, directory: str | Path) -> None:
        """Write `delta(model)` to `directory`/delta; `loratlas train` calls it when a run ends."""
        if self._drawn(model) is None:
            log.warning("the run ended in its dense phase, so there is no sparse delta to write.")
            return
        self.delta(model).save(Path(directory) / "delta")

    def _drawn(self, model: nn.Module) -> Tickets | None:
        """The tickets, once some have won; also of a finished run that was only loaded."""
        if self._state is not None:
            found = self.cfg.tickets(model)
            self.k, self._phases = self.cfg.count(found), Phases(tuple(self._state["phases"]))
            self._go_on(found, self._state)
            self._tickets, self._state = found, None
        won = self._tickets is not None and any(bool(mask.any()) for mask in self._tickets.masks.values())
        return self._tickets if won else None

    # ----------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside model, optimizer and scheduler; as large as the model."""
        tickets = self._tickets
        if tickets is None:
            return {}
        kept = {"start": tickets.start, "masks": tickets.masks, "before": tickets.before, "base": self._base}
        return {"step": self.step, "k": self.k, "phases": list(self._phases.lengths), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `attach`: go on where `state_dict` was taken."""
        self._state = state or None

    def _go_on(self, found: Tickets, state: dict[str, Any]) -> None:
        if state["k"] != self.k:
            raise UserError(
                f"the run to resume chooses K = {state['k']} entries, and now K is {self.k}: keep num_params and "
                "proportion."
            )
        if tuple(state["phases"]) != self._phases.lengths:
            raise UserError(
                f"the run to resume has phases of {state['phases']} steps, and now they are "
                f"{list(self._phases.lengths)}: keep its steps, dense_steps, dense_share and n_iterations."
            )
        if set(state["start"]) != set(found.trained) or set(state["masks"]) != set(found.maskable):
            raise UserError("the run to resume trained other parameters: keep maskable, freeze and freeze_layer_norm.")
        for kind in ("start", "masks", "before"):
            getattr(found, kind).update({n: t.to(found.trained[n].device) for n, t in state[kind].items()})
        self.step, self._base = state["step"], dict(state["base"])
