"""What fine-tuning costs elsewhere: how well the base model does its old work before and after.

For a causal language model the old work is text, measured by perplexity. For an encoder it is telling similar sentences
from others: Spearman's correlation of the scores of sentence pairs with the cosine similarity of the sentences' mean
token vectors (last hidden states, no head).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from scipy.stats import spearmanr
from torch import Tensor

from loratlas.errors import UserError
from loratlas.train.columns import Columns, find_columns
from loratlas.train.data import TaskData
from loratlas.train.encode import encode_language, token_losses
from loratlas.train.models import load_model
from loratlas.train.results import RunResult
from loratlas.train.tables import Tables, read_tables

_BATCH = 32


@dataclass(frozen=True)
class BaseTask:
    """The old work, by name.

    Attributes:
        data, test: as `tables.read_tables` takes them; of a single file all rows are used.
        limit: use that many rows.
    """

    data: str
    test: str | None = None
    max_length: int = 128
    limit: int = 1000

    def check(self, task: TaskData) -> None:
        """Raise `UserError` unless the data can be read and fit a model of `task`."""
        self._columns(task, self._rows())

    def measure(self, result: RunResult, task: TaskData) -> dict[str, Any]:
        """{"metric", "before", "after"} for the adapter or the whole model of `result`; before is the base model.

        Raises:
            UserError: the data cannot be read or do not fit.
        """
        rows = self._rows()
        columns = self._columns(task, rows)
        if task.task == "causal-lm":
            blocks = encode_language(Tables(rows, rows, ""), columns, result.model, self.max_length)["test"]
            metric, score = "perplexity", partial(_perplexity, blocks=blocks)
        else:
            spearman = partial(self._spearman, rows=rows, columns=columns, tokenizer=task.processor)
            metric, score = "spearman", spearman
        with torch.no_grad():
            before, after = (score(model) for model in _before_and_after(result, task))
        return {"metric": metric, "before": before, "after": after}

    def _rows(self) -> Dataset:
        whole = self.data if self.test is None and Path(self.data).is_file() else self.test
        return read_tables(self.data, whole, self.limit).test

    def _columns(self, task: TaskData, rows: Dataset) -> Columns:
        if task.task == "causal-lm":
            return find_columns(rows, self.data, "causal-lm", None, None)
        if task.task == "image-classification":
            raise UserError("forgetting is measured on texts: leave --base-task out for a model of images.")
        found = find_columns(rows, self.data, "regression", None, None)
        if len(found.texts) != 2:
            raise UserError(
                f"the base task {self.data} of an encoder needs pairs of texts with a score (columns sentence1, "
                f"sentence2, score); it has {', '.join(rows.column_names)}."
            )
        return found

    def _spearman(self, model: Any, rows: Dataset, columns: Columns, tokenizer: Any) -> float:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        encoder = inner.base_model  # transformers' name for what lies below the head
        cosines: list[float] = []
        for batch in _batches(rows):
            first, second = (self._vectors(encoder, batch[column], tokenizer) for column in columns.texts)
            cosines += F.cosine_similarity(first, second).tolist()
        scores = [float(score) for score in rows[str(columns.label)]]
        return float(spearmanr(cosines, scores)[0])

    def _vectors(self, encoder: Any, texts: list[Any], tokenizer: Any) -> Tensor:
        """(n, hidden): mean of the last hidden states over the tokens of each text."""
        words = [str(text or "") for text in texts]
        tokens = tokenizer(words, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        tokens = tokens.to(encoder.device)
        states = encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


def _before_and_after(result: RunResult, task: TaskData) -> Iterator[Any]:
    """The base model, then the trained one, each as long as the caller looks at it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(result.model, task).to(device).eval()
    if result.model_dir:
        yield base
        yield load_model(result.model_dir, task).to(device).eval()
        return
    model = PeftModel.from_pretrained(base, result.adapter_dir).to(device).eval()
    with model.disable_adapter():
        yield model
    yield model


def _perplexity(model: Any, blocks: Dataset) -> float:
    total = torch.zeros(2, dtype=torch.float64)
    for batch in _batches(blocks):
        ids = torch.tensor(batch["input_ids"], device=model.device)
        total += token_losses(model(input_ids=ids).logits, ids).double().sum(0).cpu()
    return float((total[0] / total[1]).exp())


def _batches(rows: Dataset) -> Iterator[dict[str, list[Any]]]:
    yield from (rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH))
