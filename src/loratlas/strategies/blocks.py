"""The blocks of a model, which are its long list of like layers (`model.layers` of Llama), and what lies outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from loratlas.errors import UserError


@dataclass(frozen=True)
class Partition:
    """The parameters of a model that require gradients: of each block, always training ones outside, and the rest."""

    blocks: list[list[nn.Parameter]]
    always: list[nn.Parameter]
    never: list[nn.Parameter]

    def trained(self, active: Sequence[int]) -> set[nn.Parameter]:
        """What trains while the blocks with these indices are active."""
        return {*self.always, *(p for index in active for p in self.blocks[index])}

    def all(self) -> Iterator[nn.Parameter]:
        """Each once, also those that blocks share."""
        yield from dict.fromkeys([*self.always, *self.never, *(p for block in self.blocks for p in block)])


def partition(
    model: nn.Module, paths: str | Sequence[str] | None = None, always: Sequence[str] | None = None
) -> Partition:
    """Blocks and the rest.

    Args:
        paths: see `find_blocks`.
        always: names of modules outside the blocks that train always; None: all outside.

    Raises:
        UserError: as `find_blocks`; a name in `always` that is no such module.
    """
    blocks = find_blocks(model, paths).values()
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    chosen = set(outside) if always is None else {name for module in always for name in _below(module, outside)}
    return Partition(
        [[p for p in block.parameters() if p.requires_grad] for block in blocks],
        [p for name, p in outside.items() if name in chosen],
        [p for name, p in outside.items() if name not in chosen],
    )


def find_blocks(model: nn.Module, paths: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The blocks by path, in order.

    Args:
        paths: dotted path of the ModuleList, or of several whose blocks count as one list; ends of paths are enough, so
            that wrappers (PEFT, DDP) do not matter. None takes the ModuleList with the most parameters that lies in no
            other.

    Raises:
        UserError: there is no such list, several end like a path, or (None) a second one is half as large.
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if paths is None:
        chosen = [_largest(lists, model)]
    else:
        chosen = [_named(path, lists) for path in ([paths] if isinstance(paths, str) else paths)]
    return {f"{path}.{index}": block for path in chosen for index, block in enumerate(lists[path])}


def _largest(lists: dict[str, nn.ModuleList], model: nn.Module) -> str:
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    sizes = {path: sum(p.numel() for p in lists[path].parameters()) for path in outer}
    ranked = sorted(sizes, key=lambda path: -sizes[path])
    if not ranked:
        raise UserError(
            f"{type(model).__name__} has no list of layers (nn.ModuleList) to sample from: LISA has no use."
        )
    if len(ranked) > 1 and 2 * sizes[ranked[1]] >= sizes[ranked[0]]:
        raise UserError(
            f"{type(model).__name__} has several lists of layers, {ranked[0]} and {ranked[1]}: name one or both in "
            "layers_path."
        )
    return ranked[0]


def _named(path: str, lists: dict[str, nn.ModuleList]) -> str:
    found = [each for each in lists if f".{each}".endswith(f".{path}")]
    if len(found) == 1:
        return found[0]
    which = f"fits {', '.join(found)}" if found else f"names no list of layers; there are {', '.join(lists) or 'none'}"
    raise UserError(f"layers_path {path!r} {which}: give the path of one nn.ModuleList.", field="layers_path")


def _below(module: str, names: dict[str, nn.Parameter]) -> list[str]:
    found = [name for name in names if f".{module}." in f".{name}."]
    if not found:
        raise UserError(
            f"always_trainable names {module!r}, which is no module outside the blocks that trains; there are "
            f"{', '.join(names)}.",
            field="always_trainable",
        )
    return found
