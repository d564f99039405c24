"""Experiment trackers that transformers' Trainer can report to."""

from __future__ import annotations

from collections.abc import Sequence

from loratlas.errors import UserError


def check_reporters(names: Sequence[str]) -> None:
    """Raise `UserError` unless transformers knows every integration in `names` and its package is installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = sorted(INTEGRATION_TO_CALLBACK)
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise UserError(f"transformers reports to no {name!r} (--report-to): choose {', '.join(known)}.")
        if name not in installed:
            raise UserError(f"--report-to {name} needs a package that is not installed: pip install {name}.")
