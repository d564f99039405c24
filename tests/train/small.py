"""Tiny models and tables on disk, as a user would have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "poor", "film", "book", "very", "not", "a", "the"]


def _tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bert(folder: Path, dropout: float = 0.1) -> str:
    set_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **sizes, **rates)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


def gpt(folder: Path) -> str:
    set_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        folder
    )
    tokenizer = _tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return str(folder)


def vit(folder: Path) -> str:
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=7, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def reviews(n: int = 60) -> list[dict[str, Any]]:
    """Texts whose label is a word of theirs."""
    pairs = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no")]
    return [
        {"text": f"a very {pairs[i % 4][0]} {'film' if i % 3 else 'book'}", "label": pairs[i % 4][1]} for i in range(n)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def image_folder(root: Path, n: int = 12) -> str:
    """Red and blue squares, one subfolder a class, below train/ and test/."""
    for part in ("train", "test"):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(n):
                pixels = np.full((16, 16, 3), index, dtype=np.uint8)
                pixels[..., channel] = 200 + index
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return str(root)
