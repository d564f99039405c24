"""Per-step method logic for plain loops and for transformers' Trainer.

    lifecycle = attach(model, optimizer, total_steps=1000)      # plain loop; nothing else changes
    Trainer(..., callbacks=[LifecycleCallback()])               # Trainer, and therefore TRL

Methods act inside `optimizer.step()`: before it, when gradients are accumulated, all-reduced, unscaled and (as in
Trainer) clipped; after it, when parameters have moved. A step that a GradScaler skips is no step. Everything is
written in place, so optimizers and DDP buckets stay valid. Under FSDP2 the tensors that methods see here are sharded:
see `sharded`.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from loratlas.engine.distributed import fsdp_modules, refuse_flat_parameters, same_start, torch_optimizer
from loratlas.engine.method import Method, View
from loratlas.engine.model import atlas_layers
from loratlas.engine.sharded import from_rank0, is_sharded, local, positions
from loratlas.engine.undecayed import Undecayed
from loratlas.errors import UserError

log = logging.getLogger(__name__)

# weak on both sides: the hooks keep a lifecycle as long as its optimizer lives, and nothing keeps the two
_ATTACHED: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Lifecycle]] = weakref.WeakKeyDictionary()


class StepContext:
    """What a method sees of the training step.

    Attributes:
        step: number of the current optimizer step, from 1; it continues where a saved adapter stopped.
        total_steps: planned number of steps, 0 if unknown. A resumed run keeps the number first planned.
        optimizer: the torch optimizer.
        scratch: a dictionary for what `before_step` leaves for `after_step`.
        memo: a dictionary for what `begin` reads off tensors, so that steps need not wait for the device to know it.
    """

    def __init__(self, optimizer: Optimizer, step: int, total_steps: int) -> None:
        self.optimizer = optimizer
        self.step = step
        self.total_steps = total_steps
        self.scratch: dict[Any, Any] = {}
        self.memo: dict[Any, Any] = {}
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def generator(self, seed: int) -> torch.Generator:
        """A CPU generator that depends on (seed, step) only."""
        return torch.Generator().manual_seed((seed * 1_000_003 + self.step) % 2**63)

    def group(self, param: Tensor) -> dict[str, Any]:
        """The optimizer's parameter group that holds `param`."""
        return self._groups[id(param)]

    def state(self, param: Tensor) -> dict[str, Any]:
        """The optimizer's state of `param`, empty before its first step."""
        return self.optimizer.state.get(param, {})

    def reset_state(self, param: Tensor, dim: int, index: Tensor) -> None:
        """Zero the slices `index` along `dim` of every state tensor shaped like `param` (moments, momentum)."""
        for value in self.state(param).values():
            if isinstance(value, Tensor) and value.shape == param.shape:
                local(value).index_fill_(dim, positions(value, dim, index), 0)

    def agree(self, choice: Tensor) -> Tensor:
        """`choice` as rank 0 has it: ties and rounding may not split the ranks of a distributed run."""
        return from_rank0(choice)


class Group(NamedTuple):
    """All layers of one adapter, with the step count of that adapter."""

    method: Method
    views: list[View]
    context: StepContext


class Lifecycle:
    """The hooks on one optimizer; made by `attach`. `remove()` takes them off again."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int | None, restart: bool, scheduler: Any
    ) -> None:
        self.optimizer = optimizer
        self.groups: list[Group] = []
        self._fsdp = fsdp_modules(model)
        self._reshard()
        refuse_flat_parameters(model, optimizer)
        same_start(model)
        for method, views in _collect(model, {id(p) for group in optimizer.param_groups for p in group["params"]}):
            step, planned = (0, 0) if restart else (int(views[0].step), int(views[0].total_steps))
            # the plan of an interrupted run stands: another total on resume would move events that have already
            # happened
            total = planned if step > 0 and planned > 0 else int(total_steps or 0)
            context = StepContext(optimizer, step, total)
            method.check_training(views, context)
            for view in views:
                view.step.fill_(step)
                view.total_steps.fill_(total)
            with torch.no_grad():
                method.begin(views, context)
            if scheduler is not None:
                method.pace(views, context, scheduler)
            self.groups.append(Group(method, views, context))
        spared = (getattr(t, name) for method, views, _ in self.groups for t in views for name in method.undecayed)
        self._undecayed = Undecayed(optimizer, spared)
        losses = [group for group in self.groups if group.method.adds_loss(group.views[0].cfg)]
        _refuse_shards(losses)
        self._terms_due = bool(losses)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if losses:
            self._handles.append(model.register_forward_hook(_LossHook(self)))
        self._skipped = False

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        # Optimizers that take a GradScaler's scale into their own step (fused Adam on CUDA) run even when gradients
        # overflowed, and drop the update inside.
        found = getattr(optimizer, "found_inf", None)
        self._skipped = found is not None and float(found) != 0.0
        if self._skipped:
            return
        self._reshard()
        if self._terms_due:
            self._terms_due = False
            log.warning(
                "%s adds a term to the loss, but this loop computes a loss of its own: add attach(...).terms() to it.",
                next(method.name for method, views, _ in self.groups if method.adds_loss(views[0].cfg)),
            )
        for method, views, context in self.groups:
            context.step += 1
            context.scratch.clear()
            method.before_step(views, context)
        self._undecayed.enter()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        if self._skipped:
            return
        self._undecayed.leave()
        for method, views, context in self.groups:
            method.after_step(views, context)
            torch._foreach_add_([view.step for view in views], 1)

    def _reshard(self) -> None:
        """A forward without backward leaves FSDP2's root with whole parameters, which the optimizer does not know."""
        for module in self._fsdp:
            module.reshard()

    def add_losses(self, output: Any) -> Any:
        """The model's output with the methods' terms added to its loss, if it has one."""
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if loss is not None:
            output["loss"] = loss + self.terms()
        return output

    def terms(self) -> Tensor | float:
        """The sum of what methods add to the loss; only for loops that do not take the loss from the model's output."""
        self._terms_due = False
        active = [group for group in self.groups if group.method.adds_loss(group.views[0].cfg)]
        return sum((group.method.extra_loss(group.views) for group in active), 0.0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _ATTACHED.pop(self.optimizer, None)


class _LossHook:
    """Forward hook that adds the methods' terms. In a copy of the model, which no optimizer trains, it does nothing."""

    def __init__(self, lifecycle: Lifecycle | None) -> None:
        # the optimizer's hooks keep the lifecycle alive
        self._lifecycle = weakref.ref(lifecycle) if lifecycle is not None else lambda: None

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        lifecycle = self._lifecycle()
        return output if lifecycle is None else lifecycle.add_losses(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _LossHook:
        return _LossHook(None)


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int | None = None,
    *,
    restart: bool = False,
    scheduler: Any = None,
) -> Lifecycle:
    """Let the adapters of `model` act at every step of `optimizer`. Call it once, before the first step.

    Calling it again with the same optimizer returns the same `Lifecycle`. Models without our adapters, and methods
    that do nothing while training, are fine: there is then nothing to do. An adapter loaded from a checkpoint
    continues its plan.

    Args:
        model: the PEFT model (or any module that contains it).
        optimizer: a torch optimizer that holds the adapter's parameters; accelerate's wrapper is unwrapped.
        total_steps: number of optimizer steps of the whole run; methods with a schedule need it.
        restart: start the plan of a trained adapter anew, for a further stage of training.
        scheduler: of the learning rate, made for `total_steps`; methods that train in phases may restart it in each.

    Raises:
        UserError: not a torch optimizer, adapters missing from it, or a run that the method cannot work with; in a
            distributed run also DeepSpeed, FSDP1, and ranks whose sharded adapters started differently.
    """
    inner = torch_optimizer(optimizer)
    attached = _ATTACHED.get(inner)
    lifecycle = attached() if attached is not None else None
    if lifecycle is None:
        lifecycle = Lifecycle(model, inner, total_steps, restart, scheduler)
        _ATTACHED[inner] = weakref.ref(lifecycle)
    return lifecycle


def is_attached(optimizer: Optimizer) -> bool:
    """Whether `attach` has been called with this optimizer, and its `Lifecycle` not removed since."""
    return torch_optimizer(optimizer) in _ATTACHED


class LifecycleCallback(TrainerCallback):
    """`attach` for transformers' Trainer: pass it in `callbacks`.

    Args:
        restart: as in `attach`.
    """

    def __init__(self, restart: bool = False) -> None:
        self.restart = restart
        self.lifecycle: Lifecycle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plan = {"total_steps": state.max_steps, "restart": self.restart, "scheduler": kwargs.get("lr_scheduler")}
        self.lifecycle = attach(kwargs["model"], kwargs["optimizer"], **plan)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.lifecycle is not None:
            self.lifecycle.remove()


def gradient(param: Tensor, ctx: StepContext) -> Tensor | None:
    """The gradient that the step is about to use, or None; unscaled where the optimizer would do that itself."""
    scale = getattr(ctx.optimizer, "grad_scale", None)
    return param.grad if scale is None or param.grad is None else param.grad / scale


def _refuse_shards(groups: list[Group]) -> None:
    """Terms of the loss are computed when the forward is over."""
    for method, views, _ in groups:
        if any(is_sharded(getattr(view, name)) for view in views for name in method.params):
            raise UserError(
                f"{method.name} adds a term to the loss that needs whole parameters, which FSDP2 frees before the loss "
                "is known: use DistributedDataParallel, or configure it without that term."
            )


def _collect(model: nn.Module, held: set[int]) -> list[tuple[Method, list[View]]]:
    """Trainable adapters by (method, adapter name), each with its layers in module order."""
    groups: dict[tuple[str, str], tuple[Method, list[View]]] = {}
    for path, layer in atlas_layers(model):
        if not layer.method.has_lifecycle():
            continue
        for adapter in layer.adapters():
            view = View(layer, adapter)
            params = [getattr(view, name) for name in layer.method.params]
            trainable = [p for p in params if p is not None and p.requires_grad]
            if not trainable:
                continue
            if not all(id(p) in held for p in trainable):
                raise UserError(
                    f"the optimizer does not hold the tensors of adapter {adapter!r} in {path}: build the optimizer "
                    "after get_peft_model, from model.parameters()."
                )
            groups.setdefault((layer.method.name, adapter), (layer.method, []))[1].append(view)
    return list(groups.values())
