"""Parameter groups of a model: which matrices are projected, which train as they are, what decays."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from loratlas.errors import UserError

# as PEFT's "all-linear" leaves them out
_HEADS = ("lm_head", "score", "classifier")

Targets = Collection[str] | str | None


def parameter_groups(
    model: nn.Module,
    projected: dict[str, Any],
    target_modules: Targets = "all-linear",
    exclude_modules: Targets = None,
    weight_decay: float = 0.0,
    max_dim: int | None = None,
) -> list[dict[str, Any]]:
    """Up to three groups of the parameters that require gradients, with their names; none is empty.

    1. the targeted matrices, with the options `projected` (rank and so on) and weight decay;
    2. other parameters of two or more dimensions, with weight decay;
    3. biases, norms and other vectors, without.

    Args:
        target_modules: names of modules, each matching wherever it is a whole part of a parameter's path ("q_proj" also
            means the LoRA factors of q_proj), a regular expression for the whole name of a module, or "all-linear":
            everything of two or more dimensions but embeddings and output heads. None is "all-linear".
        exclude_modules: modules to leave out of group 1, given alike.
        max_dim: matrices with a dimension of at least this size are not projected.

    Raises:
        UserError: nothing requires gradients, or nothing that is targeted has two dimensions.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("no parameter of the model requires gradients: unfreeze the weights that are to be trained.")
    matrices = {name: p for name, p in trained.items() if p.dim() >= 2}
    everything = target_modules in (None, "all-linear")
    left_alone = _embeddings_and_heads(model) if everything else set()
    targets = {
        name: p
        for name, p in matrices.items()
        if (everything or _matches(name, target_modules))
        and id(p) not in left_alone
        and not (exclude_modules and _matches(name, exclude_modules))
        and not (max_dim and max(p.flatten(1).shape) >= max_dim)
    }
    if not targets:
        raise UserError(
            f"target_modules={target_modules!r} names no trainable matrix of the model; its matrices are "
            f"{', '.join(list(matrices)[:5]) or 'none'}{', ...' if len(matrices) > 5 else ''}.",
            field="target_modules",
        )
    rest = {name: p for name, p in matrices.items() if name not in targets}
    vectors = {name: p for name, p in trained.items() if p.dim() < 2}
    groups: list[dict[str, Any]] = [
        {"params": list(targets.items()), "weight_decay": weight_decay, **projected},
        {"params": list(rest.items()), "weight_decay": weight_decay},
        {"params": list(vectors.items()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _matches(parameter: str, modules: Targets) -> bool:
    path = parameter.rpartition(".")[0]
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(f".{module}." in f".{path}." for module in modules or ())


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    """Identities of their parameters; an output head is what transformers says it is, or what is called so."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    left_alone: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head or name.rpartition(".")[2] in _HEADS:
            left_alone |= {id(p) for p in module.parameters()}
    return left_alone
