"""A run goes on only as the run that it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from loratlas.errors import UserError
from loratlas.train.data import TaskData

if TYPE_CHECKING:
    from loratlas.train.spec import RunSpec

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
        changed = [change for name in both for change in _changes(name, stored[name], self.settings[name])]
        if changed:
            what = ", ".join(changed)
            raise UserError(f"{checkpoint} was written by another run: {what}; resume it as it began.")


def same_run(spec: RunSpec, task: TaskData, rate: float, options: dict[str, dict[str, Any]]) -> SameRun:
    """The identity of the run of `spec` on `task` at learning rate `rate`.

    options: by mapping, with their defaults, so that a default may be written out or not.
    """
    settings = {name: value for name, value in asdict(spec).items() if name not in _FREE}
    settings |= options
    settings["learning_rate"] = rate
    settings["eval_every"] = spec.evaluation_interval
    settings["data"] = f"{task.description}, rows {_fingerprint(task.train)}"
    if task.forget is not None:
        settings["forget"] = f"{len(task.forget)} rows {_fingerprint(task.forget)}"
    return SameRun(json.loads(json.dumps(settings, default=str)))


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """What differs, in words; of two mappings the entries that do."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [change for key in sorted(old | new) for change in _changes(f"{name}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]


def _fingerprint(encoded: Dataset) -> str:
    """A hash of the rows, of `_SAMPLE` of them at equal distances where there are more."""
    rows = encoded.with_format("arrow")  # undecoded: images as their bytes or file
    digest = hashlib.sha256()
    for row in rows[range(0, len(rows), max(1, len(rows) // _SAMPLE))].to_pylist():
        for name, value in sorted(row.items()):
            if isinstance(value, dict) and value.get("path") is not None:
                value["path"] = Path(value["path"]).name  # data may move
            digest.update(f"{name}={value!r};".encode())
    return digest.hexdigest()[:12]
