"""An optimizer's state, with the names of the parameters it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loratlas.errors import UserError
from loratlas.train.state import read_state


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` and, for every group, [name, shape] of its parameters in order.

    torch keeps state by the position of a parameter, so without names a model built in another order would take
    the moments of other parameters without a word.
    """
    return {"parameters": _parameters(model, optimizer), "state_dict": optimizer.state_dict()}


def read_optimizer_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dictionary in `folder`, for `restore_optimizer`; neither model nor optimizer is changed.

    Raises:
        UserError: the optimizer holds other parameters, or the same in another order; the first is named.
    """
    saved = read_state(folder, "optimizer")
    now = _parameters(model, optimizer)
    if [len(group) for group in saved["parameters"]] != [len(group) for group in now]:
        raise UserError(
            f"{folder} was saved with an optimizer of {_sizes(saved['parameters'])} parameters, this one has "
            f"{_sizes(now)}: build model and optimizer as before."
        )
    for old, new in zip(_flat(saved["parameters"]), _flat(now), strict=True):
        if old != new:
            raise UserError(
                f"{folder} was saved with an optimizer that has {_say(old)} where this one has {_say(new)}: build "
                "model and optimizer as before, with the parameters in the same order."
            )
    return saved["state_dict"]


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(saved)`, and every tensor in the dtype in which it was saved.

    torch casts loaded state to the parameter's dtype: fp32 moments of a bf16 parameter would lose their low bits.
    """
    optimizer.load_state_dict(saved)
    parameters = _flat([group["params"] for group in optimizer.param_groups])
    for index, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and isinstance(state.get(key), Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)


def _parameters(model: nn.Module, optimizer: Optimizer) -> list[list[Any]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [[names.get(id(p), "a parameter outside the model"), list(p.shape)] for p in group["params"]]
        for group in optimizer.param_groups
    ]


def _flat(groups: list[list[Any]]) -> list[Any]:
    return [item for group in groups for item in group]


def _sizes(groups: list[list[Any]]) -> str:
    return " + ".join(str(len(group)) for group in groups)


def _say(parameter: list[Any]) -> str:
    name, shape = parameter
    return f"{name} {tuple(shape)}"
