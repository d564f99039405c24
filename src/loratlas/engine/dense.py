"""A linear layer with an update D (out, in) that is there as a matrix, for updates of full rank made of small tensors.

    y = x (W + D)^T + b              in fp32 and fp64
    y = x W^T + b + x D^T            in half precision, where the sum of W and a small update would be W

The input meets D once, whatever D is made of, and dL/dD is g^T x: two products as large as that with W, of which the
sum saves the first. Where thin products take longer than that, and rows enough share what making D takes, it pays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def takes_the_sum(x: Tensor) -> bool:
    """Whether x meets W + D: where it does not, D costs a product more in the forward pass and one in the backward."""
    return x.dtype == torch.float64 or (x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor) -> Tensor:
    """x: (..., in) to (..., out), in x's dtype or in autocast's where that is on.

    weight: W (out, in), frozen. delta: D (out, in) in the adapter's dtype; the gradient flows on to it.
    """
    device, summed = x.device.type, takes_the_sum(x)
    if torch.is_autocast_enabled(device) and not summed:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        dtype = x.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if summed:
            return F.linear(x, weight + delta.to(dtype), bias)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.addmm(F.linear(rows, weight, bias), rows, delta.to(dtype).T)
        return y.view(*x.shape[:-1], y.shape[-1])
