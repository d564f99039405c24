"""A pass over data before training: what methods with data-driven starts want to know of the target layers.

    config = LoraGAConfig(target_modules="all-linear")
    calibrate(model, config, loader, steps=8)          # fills config.calibration with what the method asks for
    model = get_peft_model(model, config)              # uses it and lets it go

| gathered | shape | over the steps i = 1..n |
|---|---|---|
| gradient | (out, in) | mean of dL_i/dW |
| fisher | (out, in) | mean of (dL_i/dW)^2, the empirical Fisher diagonal of the batches |
| activation | (in, in) | mean over tokens of x x^T, the layer input's second moment |

Each layer's gradient is taken off the weight the moment backward has finished with it, so the device holds no more than
one at a time; the sums lie in host memory, in fp32 (fp64 for fp64 models).
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loratlas.engine.method import RELATIVE_FISHER
from loratlas.engine.model import AtlasModel, targeted
from loratlas.engine.ops import Op, kind_of, op_for
from loratlas.errors import UserError

KINDS = ("gradient", "fisher", "activation")

Statistics = dict[str, dict[str, Tensor]]


def needs(config: Any) -> tuple[str, ...]:
    """Statistics that the start of this PEFT configuration asks for; empty for other packages' and saved adapters."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or not issubclass(tuner, AtlasModel) or config.initialized:
        return ()
    return tuner.method.gather(config)


def calibrate(
    model: nn.Module,
    config: Any,
    data_or_step: Iterable[Any] | Callable[[], Any],
    steps: int | None = None,
    *,
    gather: Sequence[str] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Statistics:
    """Gather statistics of the layers that `config` targets; they are returned and stored as `config.calibration`.

    The model is left as it was: weights, gradients, requires_grad, buffers and training mode (the pass runs in the mode
    it finds; dropout draws from torch's global generator). Layers that are used several times in a step count once,
    with their whole gradient; layers that share one weight get each their own. Under torch.distributed every rank gets
    the mean over all steps of all ranks.

    Args:
        model: the base model, before `get_peft_model`.
        config: its target_modules say which layers.
        data_or_step: batches, each a dictionary for `model(**batch)`, which go to the model's device by themselves; or
            a function that runs the forward of one step and returns its loss.
        steps: number of batches to use; None: all. A function is called so often and needs it.
        gather: any of "gradient", "fisher", "activation"; None: what the method of `config` asks for.
        loss: (model, batch) -> scalar, for batches that are no dictionaries or models that return no loss.

    Returns:
        {module path: {statistic: tensor}}, on the CPU. `get_peft_model` empties `config.calibration`; assign the
        returned value to the `calibration` of another configuration to use it again.

    Raises:
        UserError: an unknown statistic, or none that the method asks for; no target; a target without a dense weight
            (quantised, sharded, offloaded) or of a kind that has no such statistic; no batch; a step without a loss; a
            statistic that is not finite, with the module's name.
    """
    wanted = tuple(needs(config) if gather is None else gather)
    _check(config, wanted, data_or_step, steps)
    targets = _targets(model, config, wanted)
    backward = "gradient" in wanted or "fisher" in wanted
    done = 0
    with ExitStack() as stack:
        stack.callback(_restore, [(p, p.requires_grad) for p in model.parameters()], _copies(model))
        model.requires_grad_(False)
        for target in targets:
            stack.callback(target.close)
            target.open(backward)
        stack.enter_context(torch.set_grad_enabled(backward))
        for value in _forwards(model, data_or_step, steps, loss):
            if backward:
                _backward(value)
            for target in targets:
                target.end_step()
            done += 1
    if steps is not None and 0 < done < steps:
        warnings.warn(f"calibrate: the data ended after {done} of {steps} batches; these were used.", stacklevel=2)
    total = int(over_ranks(torch.tensor(float(done)), targets[0].module.weight.device))
    if total == 0:
        raise UserError("calibrate got no batch: give it data, or a fresh iterator if this one has been used up.")
    config.calibration = {target.path: target.means(total) for target in targets}
    _name_zeros(config.calibration)
    return config.calibration


class _Target:
    """One layer during the pass: hooks that see its gradients and inputs, and their sums in host memory."""

    def __init__(self, path: str, module: Any, op: Op, gather: Sequence[str]) -> None:
        self.path, self.module, self.op, self.gather = path, module, op, gather
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self._weight: nn.Parameter = module.weight
        self._handle: Any = None

    def open(self, backward: bool) -> None:
        if backward:
            # a stand-in over the same memory: tied layers are told apart, and the model's own Parameter, its gradient
            # and its hooks stay out of it
            stand_in = nn.Parameter(self._weight.detach())
            stand_in.register_post_accumulate_grad_hook(self._take_gradient)
            self.module.weight = stand_in
        if "activation" in self.gather:
            self._handle = self.module.register_forward_pre_hook(self._take_input)

    def close(self) -> None:
        if self.module.weight is not self._weight:
            self.module.weight = self._weight
        if self._handle is not None:
            self._handle.remove()

    def _take_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None  # called by autograd right after it has set it
        gradient = self.op.canonical(weight.grad.to_dense()).cpu()  # cast there: half the copy for 16-bit models
        weight.grad = None
        # reentrant checkpointing brings a layer's gradient in parts, which may be added but not squared one by one
        self._add("step" if "fisher" in self.gather else "gradient", gradient)

    def end_step(self) -> None:
        gradient = self.sums.pop("step", None)
        if gradient is not None:
            self._add("fisher", gradient.square())
            if "gradient" in self.gather:
                self._add("gradient", gradient)

    def _take_input(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        rows = rows.to(_wide(rows))
        self._add("activation", (rows.T @ rows).cpu())
        self.tokens += rows.shape[0]

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(value)
        else:
            self.sums[name] = value.to(_wide(value))

    def means(self, steps: int) -> dict[str, Tensor]:
        n_out, n_in = self.op.shape
        device, found = self._weight.device, {}
        for name in self.gather:
            shape = (n_in, n_in) if name == "activation" else (n_out, n_in)
            nothing = torch.zeros(shape, dtype=_wide(self._weight))
            total = over_ranks(self.sums.pop(name, nothing), device)
            count = over_ranks(torch.tensor(float(self.tokens)), device).clamp_min(1.0)
            found[name] = total.div_(count if name == "activation" else steps)
            if not torch.isfinite(found[name]).all():
                raise UserError(
                    f"calibrate: the {name} of module {self.path} is not finite: look for NaN in the data and the loss,"
                    " and calibrate float16 models in bfloat16 or float32."
                )
        return found


def _check(config: Any, gather: Sequence[str], source: Any, steps: int | None) -> None:
    unknown = sorted(set(gather) - set(KINDS))
    if RELATIVE_FISHER in unknown:
        raise UserError(
            f"{type(config).__name__}: this start compares two data sets: call loratlas.relative_fisher(model, config, "
            "forget, retain) instead of calibrate."
        )
    if unknown:
        raise UserError(f"calibrate cannot gather {unknown[0]!r}; choose from {', '.join(KINDS)}.")
    if not gather:
        raise UserError(f"{type(config).__name__} needs no calibration: leave it out, or say with gather=... what for.")
    if steps is not None and steps < 1:
        raise UserError(f"calibrate: steps must be at least 1, but it is {steps}.")
    if callable(source) and steps is None:
        raise UserError("calibrate: say with steps=N how often to call the function.")


def _targets(model: nn.Module, config: Any, gather: Sequence[str]) -> list[_Target]:
    wanted = copy.copy(config)
    if wanted.target_modules is None:  # the names that get_peft_model would fill in
        architecture = getattr(getattr(model, "config", None), "model_type", None)
        wanted.target_modules = AtlasModel.target_module_mapping.get(architecture)
    if wanted.target_modules is None:
        raise UserError("calibrate: target_modules is not set, so there is no layer to look at.")
    found = [_target(path, module, gather) for path, module in targeted(model, wanted)]
    if not found:
        raise UserError(f"calibrate: target_modules={config.target_modules} match nothing in the model.")
    return found


def _target(path: str, module: Any, gather: Sequence[str]) -> _Target:
    what = type(module).__name__
    if isinstance(module, BaseTunerLayer):
        raise UserError(f"module {path} already has an adapter: calibrate the base model, before get_peft_model.")
    kind = kind_of(module, {})
    weight = getattr(module, "_parameters", {}).get("weight")
    # quantised and sharded weights are subclasses, some of them with a floating dtype
    dense = type(weight) is nn.Parameter and weight.is_floating_point() and weight.device.type != "meta"
    if kind is None or not (dense or {"gradient", "fisher"}.isdisjoint(gather)):
        raise UserError(
            f"module {path} is a {what} without a dense weight to take a gradient of (quantised, sharded, offloaded, "
            "or no layer that adapters know): leave it out of target_modules, or calibrate the model in full "
            "precision and use its statistics as config.calibration here."
        )
    if "activation" in gather and kind not in ("linear", "conv1d"):
        raise UserError(f"module {path} is a {what}: activations are gathered of linear layers only.")
    return _Target(path, module, op_for(module, kind), gather)


def _forwards(model: nn.Module, source: Any, steps: int | None, loss: Any) -> Iterator[Any]:
    """The losses of the steps, each computed when it is asked for."""
    if callable(source):
        for _ in range(steps or 0):
            try:
                value = source()
            except StopIteration:  # of an iterator of its own
                return
            yield value
        return
    device = next(model.parameters()).device
    for batch in itertools.islice(source, steps):
        batch = send_to_device(batch, device)
        if loss is not None:
            yield loss(model, batch)
        elif isinstance(batch, Mapping):
            yield getattr(model(**batch), "loss", None)
        else:
            raise UserError(
                f"calibrate: a batch is a {type(batch).__name__}, no dictionary for model(**batch): pass "
                "loss=(model, batch) -> scalar."
            )


def _backward(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = type(value).__name__ if not isinstance(value, Tensor) else f"a tensor of shape {tuple(value.shape)}"
        raise UserError(
            f"calibrate: a step must give a scalar loss, but it gave {got}: batches need labels for models that "
            "compute their loss themselves; for others pass loss=(model, batch) -> scalar."
        )
    if not value.requires_grad:
        raise UserError("calibrate: the loss does not depend on the target layers: is it detached, or under no_grad?")
    value.backward()


def _copies(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers that the pass may move (running statistics of normalisation layers), with copies."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()] if model.training else []


def _restore(flags: list[tuple[nn.Parameter, bool]], buffers: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for buffer, before in buffers:
        if not torch.equal(buffer, before):
            buffer.copy_(before)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def over_ranks(value: Tensor, device: torch.device) -> Tensor:
    """The sum over ranks, on the CPU; `device` is where the ranks can talk."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    moved = value.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def _name_zeros(statistics: Statistics) -> None:
    silent = [path for path, named in statistics.items() if not any(value.any() for value in named.values())]
    if silent:
        warnings.warn(
            f"calibrate: nothing reached {len(silent)} of {len(statistics)} modules, the first is {silent[0]}: the "
            "loss does not depend on them in these batches. Starts that follow the data fall back to plain ones there.",
            stacklevel=3,
        )
