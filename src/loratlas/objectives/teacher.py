"""The model as it was before training as a teacher: the trained model with its adapter switched off, or another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from loratlas.errors import UserError

# PEFT's starts that rewrite the base weight, so that a disabled adapter is not the pretrained model
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Teacher:
    """Logits of the pretrained model for a batch: evaluation mode, no gradient, no labels.

    Without `given` it is the trained model with its adapter disabled, which costs a forward and no memory. Adapters of
    this library never touch the base weight, so that is exact whatever their start.

    Args:
        model: the model that trains.
        given: a model that teaches instead; it is frozen and follows the student's device.
        who: names the objective in errors.

    Raises:
        UserError: without `given`, a model without adapter, or one whose start has rewritten the base weights.
    """

    def __init__(self, model: nn.Module, given: nn.Module | None, who: str) -> None:
        self.given, self.who = given, who
        if given is not None:
            given.eval().requires_grad_(False)
        else:
            check_can_disable(model, who)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], student: Tensor) -> Tensor:
        """Logits like `student`, for the entries of `inputs` that the model takes beside the labels."""
        known = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            if self.given is None:
                with disabled(extract_model_from_parallel(model)) as base:
                    logits = base(**known).logits
            else:
                if next(self.given.parameters()).device != student.device:
                    self.given.to(student.device)
                logits = self.given(**known).logits
        if logits.shape != student.shape:
            raise UserError(
                f"{self.who}: the teacher's logits are {tuple(logits.shape)}, the model's {tuple(student.shape)}: take "
                "a teacher with the same vocabulary or classes."
            )
        return logits


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """`model` in evaluation mode without its adapter; afterwards everything is as before."""
    modes = [(module, module.training) for module in model.modules()]
    # PEFT switches every parameter of the adapter on again, also those that its method had frozen
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_can_disable(model: nn.Module, who: str) -> None:
    """Raise `UserError` unless `model` without its adapter is the pretrained model."""
    inner = extract_model_from_parallel(model)
    if not isinstance(inner, PeftModel):
        raise UserError(
            f"{who} compares with the model before training, which a {type(inner).__name__} without an adapter does "
            "not keep: train an adapter, or pass a frozen copy as build(model, teacher=...)."
        )
    for name, config in inner.peft_config.items():
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.startswith(_MOVING):
            raise UserError(
                f"{who}: the start {start!r} of adapter {name!r} has rewritten the base weights, so that switching it "
                "off does not give the pretrained model: use a loratlas adapter, or pass build(model, teacher=...)."
            )
