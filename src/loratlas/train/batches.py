"""Batches of texts of like lengths, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from loratlas.errors import UserError
from loratlas.linalg.shuffles import by_length

_COLUMN = "input_ids"


class ByLength(Sampler[int]):
    """Row numbers such that every `batch_size` of them have like lengths, the batches in random order (`by_length`).

    A pure function of lengths, seed and epoch. (LengthGroupedSampler of transformers leaves the batches sorted, so that
    training goes through long and then short texts again and again, and draws from the global random state, so that a
    resumed run would see other batches.)

    Args:
        lengths: of the rows, in tokens.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = torch.as_tensor(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        for batch in by_length(torch.arange(len(self.lengths)), self.lengths, self.batch_size, generator):
            yield from batch.tolist()


class LengthTrainer(Trainer):
    """transformers' Trainer whose strategy "group_by_length" is `ByLength`.

    Attributes:
        order: of the training rows, instead of the strategy's.
        further_columns: of the rows, which the model's forward does not take and the loss does.
    """

    order: Sampler[int] | None = None
    further_columns: tuple[str, ...] = ()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.order is not None:
            return self.order
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        return usual_order(rows, self.args)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*(known or ()), *self.further_columns]))


def usual_order(rows: Dataset, arguments: TrainingArguments) -> Sampler[int]:
    """The order in which a `LengthTrainer` with `arguments` goes through `rows`, epoch after epoch."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    if arguments.train_sampling_strategy == "group_by_length":
        return ByLength(text_lengths(rows), arguments.per_device_train_batch_size, seed)
    return SeedableRandomSampler(rows, data_seed=seed)  # what accelerate puts in the place of the Trainer's own


def text_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row.

    Raises:
        UserError: the rows are no texts.
    """
    if _COLUMN not in rows.column_names:
        raise UserError("--group-by-length is for texts: leave it out where the rows are images.")
    lengths: list[int] = pc.list_value_length(rows.with_format("arrow")[_COLUMN]).to_pylist()
    return lengths
