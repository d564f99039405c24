"""Layer kinds seen as one canonical (out, in) matrix.

| kind | layer | weight as stored | canonical |
|---|---|---|---|
| linear | nn.Linear and quantised linears | (out, in) | W |
| conv1d | transformers' Conv1D | (in, out) | W^T |
| conv2d | nn.Conv2d, groups = 1 | (out, in, kh, kw) | W.reshape(out, in * kh * kw) |
| embedding | nn.Embedding | (num_embeddings, dim) | W^T: out = dim, in = num_embeddings |
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from loratlas.errors import UserError


class Op:
    """Linear layers; the other kinds override what differs. Holds no tensors, only the module it describes.

    Attributes:
        shape: canonical (out, in).
    """

    kind: ClassVar[str] = "linear"
    takes_dropout: ClassVar[bool] = True

    def __init__(self, base: nn.Module) -> None:
        n_in, n_out = _get_in_out_features(base)
        if n_in is None or n_out is None:
            raise UserError(f"{type(base).__name__} does not say its in_features and out_features, so it has no rank.")
        self.shape: tuple[int, int] = (n_out, n_in)

    def canonical(self, stored: Tensor) -> Tensor:
        """(out, in) view of a weight as the layer stores it."""
        return stored

    def stored(self, canonical: Tensor, like: Tensor) -> Tensor:
        """Inverse of `canonical`, in the shape of `like`."""
        return canonical.reshape(like.shape)

    def full(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output with the canonical `weight` in place of its own."""
        return F.linear(x, weight, self.bias(base, x))

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """x -> up (down x) with down (r, in), up (out, r), in the dtype of x; never the (out, in) product."""
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def lora_tensors(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The factors under the names and in the shapes of PEFT's LoRA."""
        return {"lora_A.weight": down, "lora_B.weight": up}

    def rows(self, x: Tensor) -> Tensor:
        """The input as (tokens, in): what the canonical matrix multiplies."""
        return x.reshape(-1, x.shape[-1])

    def output_rows(self, y: Tensor) -> Tensor:
        """The output as (tokens, out), in the order of `rows`."""
        return y.reshape(-1, y.shape[-1])

    def scale_gradient(self, y: Tensor, scale: Tensor) -> Tensor:
        """y, an output of the layer, whose gradient gets multiplied by scale (out,)."""
        return _ScaleGradient.apply(y, scale)

    @staticmethod
    def bias(base: nn.Module, x: Tensor) -> Tensor | None:
        bias = getattr(base, "bias", None)
        return bias if bias is None else bias.to(x.dtype)


class Conv1DOp(Op):
    kind = "conv1d"

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, canonical: Tensor, like: Tensor) -> Tensor:
        return canonical.T


class Conv2dOp(Op):
    kind = "conv2d"

    def __init__(self, base: nn.Conv2d) -> None:
        if base.groups != 1:
            raise UserError(
                f"grouped convolutions (groups={base.groups}) have no single (out, in) matrix: leave the module out of "
                "target_modules."
            )
        self.base = base
        self.shape = (base.out_channels, base.in_channels * base.kernel_size[0] * base.kernel_size[1])

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.reshape(stored.shape[0], -1)

    def full(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        kernel = weight.reshape(weight.shape[0], self.base.in_channels, *self.base.kernel_size)
        return self.base._conv_forward(x, kernel, self.bias(base, x))

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        kernel = down.reshape(down.shape[0], self.base.in_channels, *self.base.kernel_size)
        hidden = self.base._conv_forward(x, kernel.to(x.dtype), None)
        return F.conv2d(hidden, up.to(x.dtype)[:, :, None, None])

    def rows(self, x: Tensor) -> Tensor:
        conv = self.base
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
        return patches.transpose(1, 2).reshape(-1, self.shape[1])

    def output_rows(self, y: Tensor) -> Tensor:
        return y.flatten(2).transpose(1, 2).reshape(-1, self.shape[0])

    def scale_gradient(self, y: Tensor, scale: Tensor) -> Tensor:
        return _ScaleGradient.apply(y, scale[:, None, None])

    def lora_tensors(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        if set(self.base.dilation) != {1} or self.base.padding_mode != "zeros":
            raise UserError(
                "PEFT's LoRA knows neither dilation nor padding modes of a convolution: export merged weights instead."
            )
        kernel = down.reshape(down.shape[0], self.base.in_channels, *self.base.kernel_size)
        return {"lora_A.weight": kernel, "lora_B.weight": up[:, :, None, None]}


class EmbeddingOp(Op):
    kind = "embedding"
    takes_dropout = False  # inputs are ids

    def __init__(self, base: nn.Embedding) -> None:
        if base.max_norm is not None:
            raise UserError(
                "an embedding with max_norm rewrites its own weight in every forward; it cannot be adapted."
            )
        self.base = base
        self.shape = (base.embedding_dim, base.num_embeddings)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, canonical: Tensor, like: Tensor) -> Tensor:
        return canonical.T

    def full(self, base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return self._scaled(self._look_up(x, weight))

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        dtype = self.base.weight.dtype
        return self._scaled(F.linear(self._look_up(x, down).to(dtype), up.to(dtype)))

    def lora_tensors(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        return {"lora_embedding_A": down, "lora_embedding_B": up}

    def _look_up(self, ids: Tensor, columns: Tensor) -> Tensor:
        base = self.base
        # base.sparse concerns the gradient of the base's own weight; the factors' gradients are dense
        return F.embedding(ids, columns.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def _scaled(self, rows: Tensor) -> Tensor:
        # Gemma-like embeddings multiply what they look up
        scale = getattr(self.base, "embed_scale", None)
        return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale.to(grads[0].dtype), None


def kind_of(base: nn.Module, quantization: dict[str, Any]) -> str | None:
    """The kind of a base layer, None if the engine knows none for it."""
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention reads this layer's weight and never calls it
    for kind, (layer, _) in _KINDS.items():
        if isinstance(base, layer):
            return kind
    backend = resolve_quantization_backend(base, **quantization)
    return backend.layer_type if backend is not None and backend.layer_type in _KINDS else None


def op_for(base: nn.Module, kind: str) -> Op:
    return _KINDS[kind][1](base)


_KINDS: dict[str, tuple[type[nn.Module], type[Op]]] = {
    "linear": (nn.Linear, Op),
    "conv1d": (Conv1D, Conv1DOp),
    "conv2d": (nn.Conv2d, Conv2dOp),
    "embedding": (nn.Embedding, EmbeddingOp),
}
