"""The tasks by name, and what is measured on each. No library is needed to know these."""

from __future__ import annotations

METRICS: dict[str, tuple[str, ...]] = {  # the first is the headline unless another is asked for
    "text-classification": ("accuracy", "f1", "matthews"),
    "image-classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "causal-lm": ("perplexity", "nll"),
}
LOWER_IS_BETTER = {"mse", "perplexity", "nll"}
TASKS = tuple(METRICS)
