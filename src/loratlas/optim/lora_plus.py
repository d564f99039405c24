"""LoRA+ (arXiv 2402.12354): AdamW with a higher learning rate for the factor that starts at zero.

    W' = W + s B A,     A (r, in) random, B (out, r) zero
    B moves with ratio * lr, A and whatever else trains with lr

A sums over all of a layer's inputs and B over r numbers only, so in wide layers one rate for both is too high for A or
too low for B. In an embedding A, (r, num_embeddings), starts at zero, and an input meets one column of it: there A has
the rate ratio * lr and B has lr. Which factor is which follows from the layer's kind and not from values, so starts
without a zero factor (PiSSA, LoRA-GA) and resumed runs have the same groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import AdamW

from loratlas.engine.config import knob
from loratlas.engine.pair_registry import low_rank_pairs
from loratlas.engine.parts import OptimizerConfig

_NAME = "LoRA+"


@dataclass
class LoraPlusConfig(OptimizerConfig):
    """Options of LoRA+.

    Raises:
        UserError: a field is out of its range.
    """

    name: ClassVar[str] = "lora-plus"
    needs_pairs: ClassVar[bool] = True

    ratio: float = knob(16.0, "Learning rate of the factor that starts at zero (B; A in embeddings), over all others'.")
    beta1: float = knob(0.9, "Moving average of the gradient.")
    beta2: float = knob(0.999, "Moving average of its square.")
    eps: float = knob(1e-8, "Added to the root of the second moment.")

    def __post_init__(self) -> None:
        self._require(0.0 < self.ratio < float("inf"), "ratio", "positive and finite")
        for name in ("beta1", "beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")
        self._require(self.eps >= 0.0, "eps", "at least 0")

    def check(self, model: nn.Module) -> None:
        low_rank_pairs(model, _NAME)

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> AdamW:
        pairs = low_rank_pairs(model, _NAME)
        from_zero = {id(pair.a if pair.kind == "embedding" else pair.b) for pair in pairs}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [(name, p) for name, p in trained if p.dim() >= 2]
        groups: list[dict[str, Any]] = [
            {"params": [(name, p) for name, p in matrices if id(p) not in from_zero]},
            {"params": [(name, p) for name, p in matrices if id(p) in from_zero], "lr": lr * self.ratio},
        ]
        if vectors := [(name, p) for name, p in trained if p.dim() < 2]:
            groups.append({"params": vectors, "weight_decay": 0.0})
        return AdamW(groups, lr, (self.beta1, self.beta2), self.eps, weight_decay)


def lora_plus(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> AdamW:
    """AdamW over everything that trains in `model`, with LoRA+'s rates.

        optimizer = lora_plus(model, lr=2e-4, ratio=16)      # model: PEFT's LoRA, or an adapter of ours with pairs

    Two or three groups, whose own rates schedulers scale alike: (1) the random factors and other matrices, such as a
    head, at lr; (2) the factors that start at zero, at ratio * lr; (3) biases, norms and other vectors, if any, at lr
    and without weight decay.

    Args:
        model: the PEFT model.
        lr: lower than plain LoRA's; the authors advise about half of it.
        weight_decay: decoupled, so that it pulls ratio times as fast in group 2.

    The other arguments are the fields of `LoraPlusConfig`.

    Raises:
        UserError: the model has no pairs or pairs that cannot be used (see `pair_registry`); an option is out of its
            range.
    """
    return LoraPlusConfig(**options).build(model, lr, weight_decay)
