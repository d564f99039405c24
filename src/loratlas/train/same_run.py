"""A run goes on only as the run that it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratlas.errors import UserError
from loratlas.train.data import TaskData

if TYPE_CHECKING:
    from loratlas.train.run import RunSpec

_SAMPLE = 64
_FREE = ("output_dir", "save_every", "report_to")  # what may change without changing a single step


@dataclass(frozen=True)
class SameRun:
    """What a run is: every setting that its steps depend on, and its data. Stored in each checkpoint, see `check`."""

    settings: dict[str, Any]

    def check(self, stored: Any, checkpoint: Path) -> None:
        """Raise `UserError` that names the settings in which the run that wrote `checkpoint` differs from this one.

        A setting that only one of the two knows came with another version, and is passed over.
        """
        if not isinstance(stored, dict) or "method" not in stored:
            raise UserError(f"{checkpoint} was not written by such a run: start anew in another directory.")
        both = sorted(stored.keys() & self.settings.keys())
        changed = [name for name in both if stored[name] != self.settings[name]]
        if changed:
            what = ", ".join(f"{name} was {stored[name]!r} and is {self.settings[name]!r}" for name in changed)
            raise UserError(f"{checkpoint} was written by another run: {what}; resume it as it began.")


def same_run(spec: RunSpec, task: TaskData, rate: float) -> SameRun:
    """The identity of the run of `spec` on `task` at learning rate `rate`."""
    settings = {name: value for name, value in asdict(spec).items() if name not in _FREE}
    settings["learning_rate"] = rate
    settings["eval_every"] = spec.evaluation_interval
    settings["data"] = f"{task.description}, rows {_fingerprint(task)}"
    return SameRun(json.loads(json.dumps(settings, default=str)))


def _fingerprint(task: TaskData) -> str:
    """A hash of the encoded training rows, of `_SAMPLE` of them at equal distances where there are more."""
    rows = task.train.with_format("arrow")  # undecoded: images as their bytes or file
    digest = hashlib.sha256()
    for row in rows[range(0, len(rows), max(1, len(rows) // _SAMPLE))].to_pylist():
        for name, value in sorted(row.items()):
            if isinstance(value, dict) and value.get("path") is not None:
                value["path"] = Path(value["path"]).name  # data may move
            digest.update(f"{name}={value!r};".encode())
    return digest.hexdigest()[:12]
