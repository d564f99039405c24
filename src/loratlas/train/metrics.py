"""What is measured on the test data, by task. All take the arrays of transformers' EvalPrediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

Measure = Callable[[EvalPrediction], dict[str, float]]


def classification(prediction: EvalPrediction) -> dict[str, float]:
    """accuracy, f1 (unweighted mean over classes) and matthews (correlation), from logits (n, classes)."""
    guess, truth = np.argmax(_logits(prediction), axis=-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
        "matthews": float(matthews_corrcoef(truth, guess)),
    }


def regression(prediction: EvalPrediction) -> dict[str, float]:
    """pearson and spearman (0 where the prediction is constant) and mse, from logits (n, 1)."""
    guess, truth = _logits(prediction).reshape(-1), np.asarray(prediction.label_ids, dtype=float).reshape(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant prediction has no correlation; that is said by the 0
        pearson, spearman = pearsonr(guess, truth)[0], spearmanr(guess, truth)[0]
    return {
        "pearson": float(np.nan_to_num(pearson)),
        "spearman": float(np.nan_to_num(spearman)),
        "mse": float(np.mean((guess - truth) ** 2)),
    }


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """perplexity = exp(mean negative log-likelihood of a token), from (n, 2): summed nll and tokens of each block."""
    nll, tokens = np.asarray(prediction.predictions, dtype=float).sum(axis=0)
    return {"perplexity": float(np.exp(nll / tokens)), "nll": float(nll / tokens)}


MEASURES: dict[str, Measure] = {
    "text-classification": classification,
    "image-classification": classification,
    "regression": regression,
    "causal-lm": perplexity,
}


def _logits(prediction: EvalPrediction) -> np.ndarray:
    logits = prediction.predictions
    return np.asarray(logits[0] if isinstance(logits, tuple) else logits)
