"""Silence for the libraries below us: under the command their notes to developers would bury the user's own lines."""

from __future__ import annotations

import logging
import os
import warnings

_CHATTY = ("torchao", "torch.utils._pytree", "transformers", "datasets", "accelerate", "peft", "httpx")


def quiet_libraries() -> None:
    """Let only errors of the libraries through, and no progress bars of theirs. Call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")  # for our own processes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the warning about forks means nothing to a user
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
