"""A pass over data before training: what methods with data-driven starts want to know of the target layers.

    statistics = calibrate(model, config, batches, gather=("gradient",), steps=8)
    statistics["encoder.layer.0.attention.self.query"]["gradient"]      # (out, in), fp32, on the CPU

| gathered | shape | over the steps i = 1..n |
|---|---|---|
| gradient | (out, in) | mean of dL_i/dW |
| fisher | (out, in) | mean of (dL_i/dW)^2, the empirical Fisher diagonal of the batches |
| activation | (in, in) | mean over tokens of x x^T, the layer input's second moment |

Each layer's gradient is taken off the weight the moment backward has finished with it, so no more than one of them
lives at a time; the sums lie in host memory. Under torch.distributed all ranks get the mean over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig
from loratlas.engine.ops import Op, kind_of, op_for
from loratlas.errors import UserError

KINDS = ("gradient", "fisher", "activation")

Statistics = dict[str, dict[str, Tensor]]


def calibrate(
    model: nn.Module,
    config: AtlasConfig,
    batches: Iterable[Any],
    *,
    gather: Sequence[str] = ("gradient",),
    steps: int | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Statistics:
    """Run `batches` through `model` and gather statistics of the modules that `config` targets.

    The model is left as it was: weights, gradients, requires_grad, training mode (the pass runs in the mode it finds).

    Args:
        model: the base model, before `get_peft_model`.
        config: its target_modules say which layers.
        batches: anything that can be iterated; each item goes to `loss`.
        gather: any of "gradient", "fisher", "activation".
        steps: number of batches to use; None: all.
        loss: (model, batch) -> scalar; default: `model(**batch).loss`.

    Raises:
        UserError: unknown statistic, no target, no batch, quantised weights (they have no gradient), or a target whose
            kind
            has no such statistic.
    """
    unknown = sorted(set(gather) - set(KINDS))
    if unknown:
        raise UserError(f"calibrate cannot gather {unknown[0]!r}; choose from {', '.join(KINDS)}.")
    targets = _targets(model, config)
    sums: Statistics = {path: {} for path in targets}
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    done = 0
    try:
        with ExitStack() as stack:
            for path, (module, op) in targets.items():
                for handle in _hooks(path, module, op, gather, sums[path]):
                    stack.callback(handle.remove)
            needs_backward = bool({"gradient", "fisher"} & set(gather))
            for p, _, _ in flags:
                p.grad = None
                p.requires_grad_(False)
            for module, _ in targets.values():
                module.weight.requires_grad_(needs_backward)
            with torch.set_grad_enabled(needs_backward):
                for batch in batches:
                    if steps is not None and done == steps:
                        break
                    value = model(**batch).loss if loss is None else loss(model, batch)
                    if needs_backward:
                        value.backward()
                    done += 1
    finally:
        for p, flag, grad in flags:
            p.requires_grad_(flag)
            p.grad = grad
    if done == 0:
        raise UserError("calibrate got no batch: give it data, and steps of at least 1.")
    return _finish(sums, done)


def _targets(model: nn.Module, config: AtlasConfig) -> dict[str, tuple[Any, Op]]:
    if config.target_modules is None:
        raise UserError("calibrate: target_modules is not set, so there is no layer to look at.")
    wanted = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
    found: dict[str, tuple[Any, Op]] = {}
    for path, module in model.named_modules():
        if not path or not check_target_module_exists(wanted, path):
            continue
        kind = kind_of(module, {})
        if kind is None or not getattr(module, "weight", torch.empty(0, dtype=torch.int8)).is_floating_point():
            raise UserError(
                f"module {path} is a {type(module).__name__}, whose weight has no gradient: leave it out of "
                "target_modules "
                "or calibrate the unquantised model."
            )
        found[path] = module, op_for(module, kind)
    if not found:
        raise UserError(f"calibrate: target_modules={config.target_modules} match nothing in the model.")
    return found


def _hooks(path: str, module: Any, op: Op, gather: Sequence[str], sums: dict[str, Tensor]) -> list[Any]:
    handles = []
    if {"gradient", "fisher"} & set(gather):

        def take_gradient(weight: Tensor) -> None:
            assert weight.grad is not None  # called by autograd right after it has set it
            gradient = op.canonical(weight.grad).float()
            weight.grad = None
            if "gradient" in gather:
                _add(sums, "gradient", gradient)
            if "fisher" in gather:
                _add(sums, "fisher", gradient.square())

        # fires only while the weight requires a gradient, that is inside the pass
        was = module.weight.requires_grad
        module.weight.requires_grad_(True)
        handles.append(module.weight.register_post_accumulate_grad_hook(take_gradient))
        module.weight.requires_grad_(was)
    if "activation" in gather:
        if op.kind not in ("linear", "conv1d"):
            raise UserError(f"module {path} is a {op.kind} layer: activations are gathered of linear layers only.")

        def take_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            _add(sums, "activation", rows.T @ rows)
            _add(sums, "tokens", torch.tensor(float(rows.shape[0])))

        handles.append(module.register_forward_pre_hook(take_input))
    return handles


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.cpu()
    sums[name] = sums[name] + value if name in sums else value


def _finish(sums: Statistics, steps: int) -> Statistics:
    """Sums to means, over steps (over tokens for activations) and over ranks."""
    result: Statistics = {}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for path, named in sums.items():
        tokens = named.pop("tokens", torch.tensor(float(steps)))
        result[path] = {}
        for name, value in named.items():
            mean = value / (tokens if name == "activation" else steps)
            if distributed:
                torch.distributed.all_reduce(mean)
                mean = mean / torch.distributed.get_world_size()
            result[path][name] = mean
    return result
