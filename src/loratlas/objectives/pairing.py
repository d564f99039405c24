"""A forget set beside a retain set: items in pairs, and batches that say which row is which.

    pairs = PairedData(forget, retain, passes=5)
    Trainer(model, args, train_dataset=pairs, data_collator=PairCollator(DataCollatorForSeq2Seq(tokenizer)), ...)

with remove_unused_columns=False and one epoch, since the passes are inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loratlas.errors import UserError
from loratlas.linalg.shuffles import Shuffles
from loratlas.objectives.loku import FORGET

RETAIN = "retain"


class PairedData(Dataset[dict[str, Any]]):
    """Item i: {"forget": forget[i mod F], "retain": a random item of the retain set}.

    Every pass over the forget set draws further retain items; none comes twice before all have come once. What item i
    is depends on (seed, i) alone: workers, ranks and a resumed run see the same pairs, and nothing has to be saved.

    Args:
        forget, retain: anything with a length and items: a list, a `datasets.Dataset`. retain None: forget alone.
        passes: how often the forget set is gone through; the length is passes times its own. 5 is the paper's.
        seed: of the drawing.

    Raises:
        UserError: one of the sets is empty, or passes is below 1.
    """

    def __init__(self, forget: Sequence[Any], retain: Sequence[Any] | None, passes: int = 5, seed: int = 0) -> None:
        if len(forget) == 0:
            raise UserError("the forget set is empty: there is nothing to unlearn.")
        if retain is not None and len(retain) == 0:
            raise UserError("the retain set is empty: give what the model shall keep, or None with retain_weight=0.")
        if passes < 1:
            raise UserError(f"PairedData: passes must be at least 1, but it is {passes}.")
        self.forget, self.retain, self.passes, self.seed = forget, retain, passes, seed
        self._partners = Shuffles(len(retain), seed) if retain is not None else None

    def __len__(self) -> int:
        return self.passes * len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = {FORGET: self.forget[index % len(self.forget)]}
        if self.retain is not None:
            item[RETAIN] = self.retain[self.partner(index)]
        return item

    def partner(self, index: int) -> int:
        """Number of the retain item that goes with item `index`."""
        assert self._partners is not None
        return self._partners[index]


class PairCollator:
    """Batches of `PairedData` items: rows forget, retain, forget, ... and the key "forget", one boolean a row.

    Args:
        collate: makes a batch of a list of plain items, padding included; labels must be padded with -100.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not items or FORGET not in items[0]:
            raise UserError(
                "PairCollator needs items of PairedData; in a Trainer set remove_unused_columns=False, or they arrive "
                "empty."
            )
        names = [name for name in (FORGET, RETAIN) if name in items[0]]
        rows = [item[name] for item in items for name in names]
        marks: Tensor = torch.tensor([name == FORGET for _ in items for name in names])
        return {**self.collate(rows), FORGET: marks}
