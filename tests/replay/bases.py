"""The base models that replays adapt: the weights of a file in ordinary layers."""

from __future__ import annotations

from torch import Tensor, nn


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """One layer, called "0", with this weight (out, in) in its dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return nn.Sequential(layer)


class Apart(nn.Module):
    """Layers beside one another, each with its own input; their weights are l0.W, l1.W, ..."""

    def __init__(self, golden: dict[str, Tensor], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(golden[f"l{k}.W"])[0] for k in range(count))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]
