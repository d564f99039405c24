"""The order of rows for a search in two halves: steps of the weights see one half, steps of the logits the other.

    sampler = SearchSampler(len(rows), per_step=32, total_steps=1000, config=config)
    for batch in DataLoader(rows, batch_size=32, sampler=sampler): ...

After the search all rows are used. The order follows from the arguments alone, so that a resumed loop skips what it has
seen, as transformers' Trainer does. `loratlas train` goes through its rows like this by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from loratlas.errors import UserError
from loratlas.linalg.shuffles import by_length

if TYPE_CHECKING:
    from loratlas.adapters.diffora import DiffoRAConfig


class Plan(NamedTuple):
    """Optimizer steps, counted from 1: weights alone up to `warmup`, in turn with the logits up to `search`."""

    warmup: int
    search: int

    def moves_logits(self, step: int) -> bool:
        return self.warmup < step <= self.search and (step - self.warmup) % 2 == 1


def plan_of(config: DiffoRAConfig, total_steps: int) -> Plan:
    """The search of a run of `total_steps`."""
    search = max(2, round(0.1 * total_steps)) if config.search_steps is None else config.search_steps
    return Plan(max(1, search // 5) if config.warmup_steps is None else config.warmup_steps, search)


class SearchSampler(Sampler[int]):
    """Row numbers in the order in which the optimizer steps of a DiffoRA run use them.

    Args:
        rows: number of training rows.
        per_step: rows of one optimizer step, of all accumulated batches and of all ranks together.
        total_steps: optimizer steps of the run.
        config: says how long the search takes, and which share of the rows its steps of the weights see.
        lengths: of the rows; those of a step then have like ones, and what is left over of an epoch waits for the next.

    Raises:
        UserError: fewer than two rows, or a share that leaves a half empty.
    """

    def __init__(
        self,
        rows: int,
        per_step: int,
        total_steps: int,
        config: DiffoRAConfig,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.per_step, self.total_steps = per_step, total_steps
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.plan = plan_of(config, total_steps)
        self.seed = seed
        order = torch.randperm(rows, generator=self._generator(0))
        cut = round(config.search_share * rows)
        if not 0 < cut < rows:
            raise UserError(
                f"a search needs two parts of the data, but search_share={config.search_share} of {rows} rows leaves "
                "one empty."
            )
        self.weights, self.architecture = order[:cut], order[cut:]

    def __len__(self) -> int:
        return self.per_step * self.total_steps

    def __iter__(self) -> Iterator[int]:
        both = torch.cat((self.weights, self.architecture))
        weights, architecture, every = (
            self._endless(part, number) for number, part in enumerate((self.weights, self.architecture, both), 1)
        )
        for step in range(1, self.total_steps + 1):
            source = weights if step <= self.plan.search else every
            yield from islice(architecture if self.plan.moves_logits(step) else source, self.per_step)

    def _endless(self, rows: Tensor, number: int) -> Iterator[int]:
        generator = self._generator(number)
        while self.lengths is None or len(rows) < self.per_step:
            yield from rows[torch.randperm(len(rows), generator=generator)].tolist()
        while True:
            for batch in by_length(rows, self.lengths, self.per_step, generator)[: len(rows) // self.per_step]:
                yield from batch.tolist()

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(4 * self.seed + number)
