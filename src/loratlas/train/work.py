"""What a run works on, by name: enough to load it again, in another process as well."""

from __future__ import annotations

from dataclasses import dataclass

from loratlas.train import demo
from loratlas.train.data import TaskData, load_task
from loratlas.train.tables import read_rows, read_tables


@dataclass(frozen=True)
class Work:
    """A model and data; see `tables.read_tables` and `data.load_task` for the fields.

    Attributes:
        model: hub id or path; None is the demo's.
        data: file, folder or dataset of the hub; None is the demo's.
        forget: set of rows beside those of `data`, as `tables.read_rows` takes it, for objectives that unlearn it.
        max_length: None means 128, and `demo.MAX_LENGTH` for the demo's texts.
    """

    model: str | None = None
    data: str | None = None
    test: str | None = None
    task: str | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    metric: str | None = None
    max_length: int | None = None
    limit: int | None = None
    forget: str | None = None

    @property
    def base(self) -> str:
        """Hub id or path of the base model."""
        return self.model or demo.demo_model()

    @property
    def length(self) -> int:
        """Longest text in tokens."""
        return self.max_length or (demo.MAX_LENGTH if self.data is None else 128)

    def load(self) -> TaskData:
        """Read and encode the data.

        Raises:
            UserError: data that `read_tables` or `load_task` refuses.
        """
        tables = read_tables(self.data, self.test) if self.data is not None else demo.docstrings()
        task = load_task(
            tables.limited(self.limit),
            self.base,
            name=self.data or demo.NAME,
            task=self.task,
            text_columns=list(self.text_columns),
            label_column=self.label_column,
            metric=self.metric,
            max_length=self.length,
            forget=None if self.forget is None else read_rows(self.forget, self.limit),
        )
        task.work = self
        return task
