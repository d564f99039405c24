"""What an adapted model is, in numbers a user should see before hours of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from loratlas.engine.layer import AtlasLayer
from loratlas.engine.method import View
from loratlas.engine.rank_log import LOG
from loratlas.engine.serving import max_lora_rank

_ADAPTER = "default"
_NO_RANK = (1_000_003, 1_000_033)  # (out, in) that no rank is, to see which dimensions are one


@dataclass(frozen=True)
class Facts:
    """
    Attributes:
        modules: number of adapted modules, 0 where the base model's own weights train.
        scaling: (smallest, largest) effective scaling s over the modules; None for methods without one.
        export_rank: rank that an exact plain LoRA of the trained adapter will have at most; None without a LoRA form.
        remarks: what else there is to say.
    """

    modules: int
    scaling: tuple[float, float] | None
    trainable_parameters: int
    total_parameters: int
    export_rank: int | None
    remarks: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """The facts for people."""
        share = self.trainable_parameters / self.total_parameters
        if self.modules == 0:
            count = f"{self.trainable_parameters:,} of {self.total_parameters:,}"
            return [f"the base model's own weights train ({count}): it ships as a whole model", *self.remarks]
        scale = "" if self.scaling is None else f", scaling s = {_span(*self.scaling)}"
        size = (
            f"{self.modules} modules adapted{scale}, {self.trainable_parameters:,} trainable parameters ({share:.2%})"
        )
        if self.export_rank is None:
            return [size, "this method has no LoRA form: it ships as merged weights", *self.remarks]
        allowed = max_lora_rank(self.export_rank)
        server = "more than vLLM serves" if allowed is None else f"vLLM: --max-lora-rank {allowed}"
        return [size, f"an exact LoRA export will have rank {self.export_rank} ({server})", *self.remarks]


def facts(model: nn.Module, total_steps: int, remarks: Sequence[str] = ()) -> Facts:
    """The facts of `model` for a run of `total_steps` optimizer steps."""
    layers = list(_layers(model, total_steps))
    scalings = [scaling for scaling, _ in layers if scaling is not None]
    ranks = [rank for _, rank in layers]
    known = [rank for rank in ranks if rank is not None]
    return Facts(
        len(layers),
        (min(scalings), max(scalings)) if scalings else None,
        *_parameters(model),
        max(known) if known and len(known) == len(ranks) else None,
        tuple(remarks),
    )


def used_parameters(model: nn.Module, trainable: int) -> int | None:
    """What of `trainable` parameters the ranks in use amount to; None where no adapter's ranks move.

    Of adapters that keep a `rank_log`: its last entry in the place of every dimension that is a rank.
    """
    layers = [m for m in model.modules() if isinstance(m, AtlasLayer) and _ADAPTER in m.adapters()]
    moving = [layer.view(_ADAPTER) for layer in layers if LOG in layer.method.buffers]
    return trainable - sum(map(_unused, moving)) if moving else None


def _unused(t: View) -> int:
    """Numbers in the trained tensors of one layer that belong to no rank in use."""
    if len(t.rank_log) == 0:
        return 0
    n_out, n_in = _NO_RANK
    method, rank = t.layer.method, int(t.rank_log[-1, 1])
    free = set(method.params) - set(method.frozen(t.cfg))
    shapes = {name: shape for name, shape in method.shapes(t.cfg, t.r, n_in, n_out).items() if name in free}
    unused = 0
    for name, shape in shapes.items():
        tensor = getattr(t, name)
        used = (size if probe in _NO_RANK else rank for size, probe in zip(tensor.shape, shape, strict=True))
        unused += tensor.numel() - math.prod(used)
    return unused


def _parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all)."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.numel() if p.requires_grad else 0, p.numel()) for p in model.parameters()]
    return sum(trained for trained, _ in sizes), sum(size for _, size in sizes)


def _layers(model: nn.Module, total_steps: int) -> Iterator[tuple[float | None, int | None]]:
    """(scaling, export rank) of every adapted module, as far as its library tells."""
    for module in model.modules():
        if isinstance(module, AtlasLayer) and _ADAPTER in module.adapters():
            view = module.view(_ADAPTER)
            yield view.scaling, module.method.export_rank(view, total_steps)
        elif isinstance(module, LoraLayer) and _ADAPTER in module.r:
            plain = not module.use_dora.get(_ADAPTER, False)
            yield module.scaling[_ADAPTER], module.r[_ADAPTER] if plain else None
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, AtlasLayer | LoraLayer):
            yield None, None


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
