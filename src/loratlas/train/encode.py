"""Texts and images as model inputs, one function a task."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, DataCollatorWithPadding, default_data_collator

from loratlas.errors import UserError
from loratlas.train.columns import Columns
from loratlas.train.tables import Tables

Encoder = Callable[[Tables, Columns, str, int], dict[str, Any]]


def load_processor(cls: Any, model: str) -> Any:
    """The tokenizer or image processor of `model`.

    Raises:
        UserError: there is no such model, or it has none.
    """
    what = "image processor" if cls is AutoImageProcessor else "tokenizer"
    try:
        return cls.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the {what} of {model!r} could not be loaded: {reason}") from None


def encode_texts(tables: Tables, columns: Columns, model: str, max_length: int) -> dict[str, Any]:
    """One text or a pair of texts a row, cut to `max_length` tokens and padded by batch."""
    tokenizer = _tokenizer(model)

    def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [[str(text or "") for text in batch[column]] for column in columns.texts]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    train, test = (_mapped(rows, tokens, keep=["labels"]) for rows in (tables.train, tables.test))
    return {"train": train, "test": test, "collator": DataCollatorWithPadding(tokenizer), "processor": tokenizer}


def encode_language(tables: Tables, columns: Columns, model: str, max_length: int) -> dict[str, Any]:
    """The texts joined by end-of-text tokens and cut into blocks of `max_length`; a shorter rest is dropped."""
    tokenizer = _tokenizer(model)
    named = (("training", tables.train), ("test", tables.test))
    train, test = (language_blocks(rows, part, columns, tokenizer, max_length) for part, rows in named)
    return {
        "train": train,
        "test": test,
        "collator": default_data_collator,
        "processor": tokenizer,
        "preprocess_logits": token_losses,
    }


def language_blocks(rows: Dataset, part: str, columns: Columns, tokenizer: Any, max_length: int) -> Dataset:
    """Blocks of `max_length` tokens; part: what the rows are, for errors.

    Raises:
        UserError: the texts are shorter than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def blocks(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [str(text) for text in batch[columns.texts[0]] if text]
        ids = list(chain.from_iterable([*row, *end] for row in tokenizer(texts)["input_ids"])) if texts else []
        cut = [ids[at : at + max_length] for at in range(0, len(ids) - max_length + 1, max_length)]
        return {"input_ids": cut, "labels": [list(block) for block in cut]}

    encoded = _mapped(rows, blocks, keep=[])
    if len(encoded) == 0:
        raise UserError(f"the {part} texts are shorter than one block of {max_length} tokens: lower --max-length.")
    return encoded


def encode_images(tables: Tables, columns: Columns, model: str, max_length: int) -> dict[str, Any]:
    """Images decoded and resized when they are read, so that no pixel is stored twice."""
    processor = load_processor(AutoImageProcessor, model)
    column = str(columns.image)

    def pixels(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[column]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["labels"]}

    parts = [
        rows.select_columns([column, "labels"]).cast_column(column, Image()).with_transform(pixels)
        for rows in (tables.train, tables.test)
    ]
    return {"train": parts[0], "test": parts[1], "collator": default_data_collator, "processor": processor}


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """(n, 2): summed negative log-likelihood and number of predicted tokens of each block.

    Keeps two numbers of logits (n, length, vocabulary) that would not fit in memory for a whole test set.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return torch.stack([nll.sum(1), (targets != -100).sum(1).to(nll.dtype)], dim=1)


ENCODERS: dict[str, Encoder] = {
    "text-classification": encode_texts,
    "regression": encode_texts,
    "causal-lm": encode_language,
    "image-classification": encode_images,
}


def _tokenizer(model: str) -> Any:
    tokenizer = load_processor(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-like models have no padding of their own
    return tokenizer


def _mapped(rows: Dataset, function: Callable[..., Any], keep: list[str]) -> Dataset:
    drop = [column for column in rows.column_names if column not in keep]
    return rows.map(function, batched=True, remove_columns=drop)
