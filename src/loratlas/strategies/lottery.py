"""What LT-SFT decides and holds still: which parameters may change, which entries do, and where they started."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loratlas.engine.sharded import from_rank0, is_sharded
from loratlas.errors import UserError
from loratlas.linalg.largest import CHUNK, cut_at

_NORMS = ("LayerNorm", "RMSNorm")


@dataclass
class Tickets:
    """The entries of a model that won, and all that trains beside them.

    Attributes:
        maskable: parameters of which a few entries change, by name.
        whole: parameters that train in full, such as a new head.
        frozen: parameters that stay as they are although they require gradients.
        start: values of `maskable` and `whole` before training (theta0).
        masks: {name: bool}, the entries of `maskable` that won so far.
        before: values that the dense phase that runs now gives back; empty in the first, which gives back `start`.
    """

    maskable: dict[str, nn.Parameter]
    whole: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]
    start: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {**self.maskable, **self.whole}

    @property
    def size(self) -> int:
        """Entries of which some may win."""
        return sum(p.numel() for p in self.maskable.values())

    def begin(self) -> None:
        """Copy the start; nothing has won."""
        self.start, self.before = self._copy(), {}
        self.masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.maskable.items()}

    def dense(self) -> None:
        """A further dense phase begins: keep what it will give back."""
        self.before = self._copy()

    @torch.no_grad()
    def draw(self, k: int, every_tie: bool) -> None:
        """Let the `k` entries that moved farthest from the start win, beside those that have; rewind everything.

        Raises:
            UserError: a parameter is not finite.
        """
        for name, p in self.maskable.items():
            if not bool(torch.isfinite(p).all()):
                raise UserError(
                    f"{name} is not finite after the dense phase, so nothing can be ranked: lower the rate."
                )
        if k:
            cut = cut_at(lambda: (score[~mask] for score, mask in self._scores()), k)
            for score, mask in self._scores():
                mask[~mask] = cut.take(score[~mask], every_tie)
        for mask in self.masks.values():
            mask.copy_(from_rank0(mask))  # rounding on unlike machines may not split the ranks
        for name, p in self.trained.items():
            p.copy_((self.before or self.start)[name])
        self.before = {}

    def _scores(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(|p - theta0|, mask) in flat chunks; the masks are views, to be written."""
        for name, p in self.maskable.items():
            parts = (t.reshape(-1).split(CHUNK) for t in (p.detach(), self.start[name]))
            for now, then, mask in zip(*parts, self.masks[name].view(-1).split(CHUNK), strict=True):
                precise = torch.float64 if now.dtype == torch.float64 else torch.float32
                yield (now.to(precise) - then.to(precise)).abs_(), mask

    def mask_gradient(self, name: str, p: Tensor) -> None:
        """Drop the gradient of entries that have not won; a NaN among them too."""
        if p.grad is not None:
            p.grad.masked_fill_(~self.masks[name], 0)

    @torch.no_grad()
    def hold(self) -> None:
        """Put entries that have not won back to the start, whatever decay or momentum made of them."""
        for name, p in self.maskable.items():
            torch.where(self.masks[name], p, self.start[name], out=p.data)

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}


def tickets(model: nn.Module, maskable: str | None, freeze: str | None, freeze_layer_norm: bool) -> Tickets:
    """Sort the parameters of `model` that require gradients; a tied one counts once, under its first name.

    Raises:
        UserError: no parameter is left to choose from, or sharded ones.
    """
    inner = unwrapped(model)
    norms = {id(p) for m in inner.modules() if type(m).__name__.endswith(_NORMS) for p in m.parameters(recurse=False)}
    found = Tickets({}, {}, {})
    chosen = maskable if maskable is not None else _base_pattern(inner)
    for name, p in inner.named_parameters():
        if is_sharded(p):
            raise UserError("LT-SFT ranks whole parameters, and FSDP2 shards them: use DistributedDataParallel.")
        if not p.requires_grad:
            continue
        if (freeze is not None and re.search(freeze, name)) or (freeze_layer_norm and id(p) in norms):
            found.frozen[name] = p
        else:
            (found.maskable if re.search(chosen, name) else found.whole)[name] = p
    if not found.maskable:
        how = f"maskable={maskable!r} finds none" if maskable is not None else "none requires gradients"
        raise UserError(f"LT-SFT has no parameter to choose from: {how} in this {type(inner).__name__}.")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without DistributedDataParallel and torch.compile around it."""
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def _base_pattern(model: nn.Module) -> str:
    """transformers' models name the part without a head; elsewhere everything is base."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"^{re.escape(prefix)}\\." if prefix and hasattr(model, prefix) else ""
