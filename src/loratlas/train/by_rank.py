"""A trained adapter at every rank: what its LoRA export of that rank weighs, and what it scores.

Each rank is exported, loaded on the base model by stock PEFT and evaluated as a run evaluates: a row is what
`loratlas export --rank N` would ship. Methods whose ranks are nested (`engine.nested`) have trained for every rank;
adapters of the others are cut to the best approximation of each module's update.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from loratlas.analysis.adapter_folder import AdapterFolder
from loratlas.analysis.update import method_of
from loratlas.engine.export import ExportReport, export_lora
from loratlas.engine.nested import nested_rank, use_rank
from loratlas.errors import UserError
from loratlas.train.adapted import load_adapted
from loratlas.train.data import TaskData
from loratlas.train.measure import measured
from loratlas.train.models import load_model
from loratlas.train.output import read_note
from loratlas.train.spec import RunSpec, training_arguments

_ALL_UP_TO = 16  # of larger ranks the powers of two


@dataclass(frozen=True)
class AtRank:
    """One rank. bytes: of the exported file, each module at its own rank. relative_error: of the export, 0 is exact."""

    rank: int
    bytes: int
    relative_error: float
    metrics: dict[str, float]


@dataclass
class ByRank:
    """The table. nested: the method has trained for every rank. rows: smallest rank first, the last one is exact."""

    directory: str
    method: str
    data: str
    metric: str
    greater_is_better: bool
    nested: bool
    ranks: list[int]
    rows: list[AtRank] = field(default_factory=list)


class RankTable:
    """Evaluates `folder` at its ranks, one after the other.

    Args:
        spec: says the base model, and the batch size and precision of evaluations.
        ranks: those to look at; None: all up to 16, then powers of two and the largest.

    Raises:
        UserError: the method has no LoRA form, the adapter is PEFT's own, a rank beyond the adapter's, other classes
            than those of the training; and as `adapted.load_adapted`.
    """

    def __init__(
        self, folder: AdapterFolder, task: TaskData, spec: RunSpec, ranks: Sequence[int] | None = None
    ) -> None:
        method = method_of(folder)
        if method is None:
            raise UserError(
                f"{folder.directory} is a {folder.config['peft_type']} adapter of PEFT, which knows one rank only: "
                "load a plain LoRA with loratlas.load_lora and save that, and it can be cut to others."
            )
        _same_classes(folder, task)
        self.task, self.spec = task, spec
        self._model = load_adapted(folder, spec.model)
        widest = nested_rank(self._model)
        if widest is not None:
            use_rank(self._model, widest)
        with tempfile.TemporaryDirectory() as scratch:
            exact = self._exported(Path(scratch), None).exact_rank
        self.found = ByRank(
            str(folder.directory),
            method.name,
            task.description,
            task.metric,
            task.greater_is_better,
            widest is not None,
            _chosen(exact, ranks),
        )

    def rows(self) -> Iterator[AtRank]:
        """The rows as they are found; `found` holds them as well."""
        base = load_model(self.spec.model, self.task).eval()
        with tempfile.TemporaryDirectory() as scratch:
            spec = replace(self.spec, output_dir=scratch, report_to=())
            arguments = training_arguments(spec, self.task, spec.learning_rate or 1.0)  # no step is taken
            for rank in self.found.ranks:
                folder = Path(scratch) / f"rank-{rank}"
                report = self._exported(folder, rank)
                plain = PeftModel.from_pretrained(base, str(folder))
                metrics = measured(plain, self.task, arguments, self.task.test)
                base = plain.unload()
                size = (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
                self.found.rows.append(AtRank(rank, size, report.relative_error, metrics))
                yield self.found.rows[-1]

    def _exported(self, folder: Path, rank: int | None) -> ExportReport:
        return export_lora(self._model, folder, rank=rank, ranks="each")


def _chosen(exact: int, wanted: Sequence[int] | None) -> list[int]:
    if wanted:
        beyond = max(wanted)
        if beyond > exact:
            raise UserError(f"rank {beyond} is beyond the adapter's, which is exact at rank {exact}.")
        return sorted(set(wanted))
    powers = (2**exponent for exponent in range(exact.bit_length()))
    return sorted({*range(1, min(exact, _ALL_UP_TO) + 1), *powers, exact})


def _same_classes(folder: AdapterFolder, task: TaskData) -> None:
    note: dict[str, Any] = read_note(folder.directory) or {"labels": task.labels}
    if note["labels"] != task.labels:
        raise UserError(
            f"the data have the classes {_names(task.labels)}, but the adapter in {folder.directory} was trained for "
            f"{_names(note['labels'])}: give rows of the same classes."
        )


def _names(labels: list[str] | None) -> str:
    return "none" if not labels else ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
