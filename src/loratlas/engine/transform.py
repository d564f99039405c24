"""The forward of methods that change W by more than a sum: y = x W'^T + b with W' = f_k(... f_1(W)).

W' is as large as W. It is not kept between forward and backward but built again in the backward pass: x and the
adapter's own tensors are all that is saved, and the product with x is not repeated. A method that reaches the same
output by calls of the frozen layer (`Method.output`) builds nothing and needs no dequantised weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loratlas.engine.method import View

if TYPE_CHECKING:
    from loratlas.engine.layer import AtlasLayer


def transformed(layer: AtlasLayer, x: Tensor, views: Sequence[View]) -> Tensor:
    """The output of `layer` under the adapters of `views`, each on the weight that those before it have made."""
    *before, last = views
    inner: Callable[[Tensor], Tensor] = partial(transformed, layer, views=before) if before else layer.base_layer
    y = layer.method.output(last, inner, x)
    if y is not None:
        return y
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _under_torch_func():
        return checkpoint(_rebuilt, layer, x, views, use_reentrant=False, preserve_rng_state=False)
    return _rebuilt(layer, x, views)


def _rebuilt(layer: AtlasLayer, x: Tensor, views: Sequence[View]) -> Tensor:
    weight = layer.base_matrix()
    with torch.autocast(x.device.type, enabled=False):  # the very weight that merging would make
        for view in views:
            weight = layer.method.merged(view, weight)
    dtype = x.dtype if x.is_floating_point() else layer.weight.dtype  # embeddings look ids up
    return layer.op.full(layer.base_layer, x, weight.to(dtype))


def _under_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()
