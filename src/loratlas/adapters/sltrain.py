"""SLTrain: sparse plus low-rank (arXiv 2406.02214; official code andyjm3/SLTrain).

    pretraining    y = x (s B A + S)^T + b            `replace_linears`: no dense weight at all
    fine-tuning    y = x (W + s B A + S)^T + b        `SLTrainConfig`: an adapter on a frozen W

S is sparse with a random support that never changes; its values train. The low-rank part carries the head of the
spectrum, the sparse part the tail. Nothing dense is kept between forward and backward (see `engine.sparse_low_rank`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratlas.engine.config import AtlasConfig, knob
from loratlas.engine.method import Method, View
from loratlas.engine.registry import adapter
from loratlas.engine.sparse_low_rank import dense, draw_support, sparse_low_rank_linear
from loratlas.errors import UserError
from loratlas.linalg.seeded import seed_of


class SLTrain(Method):
    """Tensors: A (r, in), B (out, r), values (nnz,) trainable; support (nnz,), flat positions in the matrix."""

    name = "sltrain"
    params = ("A", "B", "values")
    buffers = ("support",)

    def shapes(self, cfg: SLTrainConfig, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        entries = (nonzeros(cfg.density, n_out, n_in),)
        return {"A": (r, n_in), "B": (n_out, r), "values": entries, "support": entries}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {"support": torch.int32}

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        n_out, n_in = t.op.shape
        if t.r > min(t.op.shape):
            return min(t.op.shape)
        if n_out * n_in >= 2**31:
            raise UserError(f"its {n_out} x {n_in} entries are more than an adapter's support counts: leave it out.")
        seed = seed_of("sltrain", t.cfg.seed, t.layer.path)
        t.support.copy_(draw_support(seed, n_out, n_in, len(t.values)))
        nn.init.kaiming_uniform_(t.A, a=5**0.5)
        if not t.cfg.init_weights:
            nn.init.kaiming_uniform_(t.B, a=5**0.5)
            nn.init.normal_(t.values, std=n_in**-0.5)
        return None

    def whole(self, t: View, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        if dropout == 0.0:
            return sparse_low_rank_linear(x, t.B, t.A * t.scaling, t.values, t.support, weight, bias)
        dropped = nn.functional.dropout(x, dropout)
        return nn.functional.linear(x, weight, bias) + self.delta(t, dropped)

    def delta(self, t: View, x: Tensor) -> Tensor:
        return sparse_low_rank_linear(x, t.B, t.A * t.scaling, t.values, t.support)

    def delta_weight(self, t: View) -> Tensor:
        return dense(t.B, t.A * t.scaling, t.values, t.support)


@adapter(SLTrain())
@dataclass
class SLTrainConfig(AtlasConfig):
    """SLTrain on a frozen base, and the options of `replace_linears`.

    Raises:
        UserError: a field is out of its range.
    """

    density: float = knob(0.03, "Share of the entries that the sparse part holds; the paper has 0.03, for 7B 0.05.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0.0 < self.density < 1.0, "density", "above 0 and below 1")


def nonzeros(density: float, n_out: int, n_in: int) -> int:
    """Entries of the sparse part, at least one."""
    return max(1, int(density * n_out * n_in))


class SLTrainLinear(nn.Module):
    """A linear layer that has no dense weight: y = x (s B A + S)^T + b.

    A (r, in) and the values start uniform in +-1 / sqrt(in), B (out, r) at zero, so that W = S at first; the bias
    uniform in +-1 / sqrt(out), as in the official code. train_scaling: s = tanh(scaling) trains, from tanh(1) on.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        r: int,
        density: float = 0.03,
        lora_alpha: float | None = None,
        *,
        bias: bool = True,
        train_scaling: bool = False,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= r <= min(n_in, n_out):
            raise UserError(f"SLTrain: r={r} must lie between 1 and {min(n_in, n_out)}, the smaller side of the layer.")
        place = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = n_in, n_out
        self.A = nn.Parameter(torch.empty(r, n_in, **place).uniform_(-(n_in**-0.5), n_in**-0.5))
        self.B = nn.Parameter(torch.zeros(n_out, r, **place))
        count = nonzeros(density, n_out, n_in)
        self.values = nn.Parameter(torch.empty(count, **place).uniform_(-(n_in**-0.5), n_in**-0.5))
        self.bias = nn.Parameter(torch.empty(n_out, **place).uniform_(-(n_out**-0.5), n_out**-0.5)) if bias else None
        self.scaling = nn.Parameter(torch.ones(1, **place)) if train_scaling else None
        self._scale = 1.0 if lora_alpha is None else lora_alpha / r
        self.support: Tensor
        self.register_buffer("support", draw_support(seed, n_out, n_in, count).to(device))

    def _down(self) -> Tensor:
        return self.A * (self._scale if self.scaling is None else self.scaling.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return sparse_low_rank_linear(x, self.B, self._down(), self.values, self.support, None, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W = s B A + S, (out, in)."""
        return dense(self.B, self._down(), self.values, self.support)

    def extra_repr(self) -> str:
        r, count = len(self.A), len(self.values)
        return f"in_features={self.in_features}, out_features={self.out_features}, r={r}, nonzeros={count}"


def replace_linears(model: nn.Module, config: SLTrainConfig, *, train_scaling: bool = False) -> list[str]:
    """Put an `SLTrainLinear` in the place of every nn.Linear that config.target_modules names; returns their paths.

    For pretraining: the old weights are discarded. target_modules is a list of parts of a path ("attn", "mlp") or a
    regular expression for all of it. The support of a layer depends on config.seed and its path alone, so that ranks
    agree. Save and load the model's `state_dict` as usual; a model to load into is made by the same call.

    Raises:
        UserError: nothing matches, a match's weight is shared with another module, or r exceeds a layer's smaller side.
    """
    wanted = config.target_modules
    chosen = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and _matches(path, wanted) and not _matches(path, config.exclude_modules)
    }
    if not chosen:
        raise UserError(f"SLTrain: target_modules={wanted!r} name no nn.Linear of {type(model).__name__}.")
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(path)
    for path, module in chosen.items():
        if len(owners[id(module.weight)]) > 1:
            others = ", ".join(other for other in owners[id(module.weight)] if other != path)
            raise UserError(f"SLTrain: the weight of {path} is shared with {others}: leave it out (exclude_modules).")
    layers: dict[str, SLTrainLinear] = {}
    for path, old in chosen.items():
        try:
            layers[path] = SLTrainLinear(
                old.in_features,
                old.out_features,
                config.r,
                config.density,
                config.lora_alpha,
                bias=old.bias is not None,
                train_scaling=train_scaling,
                seed=seed_of("sltrain", config.seed, path),
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
        except UserError as error:
            raise UserError(f"module {path}: {error}") from None
    for path, layer in layers.items():  # all of them or none
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.train(model.training))
    return list(chosen)


def to_dense(model: nn.Module) -> nn.Module:
    """`model` with an ordinary nn.Linear in the place of every `SLTrainLinear`, in place; the same function."""
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, SLTrainLinear)]:
        parent, _, name = path.rpartition(".")
        place = {"device": layer.A.device, "dtype": layer.A.dtype}
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **place)
        linear.weight.data.copy_(layer.dense_weight())
        if layer.bias is not None:
            linear.bias.data.copy_(layer.bias)
        setattr(model.get_submodule(parent), name, linear)
    return model


def _matches(path: str, wanted: Any) -> bool:
    if not wanted:
        return False
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, path) is not None
    return any(part in path for part in wanted)
