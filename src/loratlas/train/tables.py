"""Raw data from wherever it lies: the hub, JSONL, CSV, Parquet and text files, folders of these or of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from loratlas.errors import UserError

# Hub tests often carry no labels, and a test set is for the end: evaluate on validation data where there is any.
_TEST_NAMES = ("validation", "valid", "val", "dev", "eval", "test")
_READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_HELD_OUT = 0.1


class Tables(NamedTuple):
    """Training and test rows, and in words where the test rows come from."""

    train: Dataset
    test: Dataset
    split: str

    def limited(self, limit: int | None, seed: int = 0) -> Tables:
        """At most `limit` rows of each part, chosen with `seed`; None means all."""
        if limit is None:
            return self
        return Tables(_first(self.train, limit, seed), _first(self.test, limit, seed), self.split)


def read_tables(data: str, test: str | None = None, limit: int | None = None, seed: int = 0) -> Tables:
    """Read `data`: a file, a folder, or a dataset of the hub ("name" or "name:config").

    A folder holds files named after their split (train.jsonl, dev.csv, ...) or images in one subfolder a class, below
    train/ and test/ if it has these. Without test rows a tenth of the training rows is held out.

    Args:
        test: file with the test rows, or the name of a split of `data`.
        limit: use at most that many rows of each part, chosen with `seed`.

    Raises:
        UserError: nothing there, an unknown format, a broken line (with file and line), or no rows.
    """
    parts = _parts(data)
    train = parts["train"]
    held, split = _test_rows(data, parts, test)
    if held is None:
        if len(train) < 10:
            raise UserError(f"{data} has {len(train)} rows and no test rows, too few to hold a tenth out: use --test.")
        halves = train.train_test_split(test_size=_HELD_OUT, seed=seed)
        train, held, split = halves["train"], halves["test"], "a tenth of the rows, held out"
    for name, rows in (("training", train), ("test", held)):
        if len(rows) == 0:
            raise UserError(f"{data} has no {name} rows.")
    return Tables(train, held, split).limited(limit, seed)


def read_rows(data: str, limit: int | None = None, seed: int = 0) -> Dataset:
    """The training rows of `data` as `read_tables` reads them, with none held out.

    Raises:
        UserError: as `read_tables`.
    """
    rows = _parts(data)["train"]
    if len(rows) == 0:
        raise UserError(f"{data} has no rows.")
    return rows if limit is None else _first(rows, limit, seed)


def _parts(data: str) -> dict[str, Dataset]:
    """{split: rows}, "train" among them."""
    path = Path(data)
    if path.is_file():
        parts = {"train": _read_file(path)}
    elif path.is_dir():
        parts = _read_folder(path)
    elif path.suffix in _READERS or data.startswith((".", "/", "~")):
        raise UserError(f"there is no file or folder {data}.")
    else:
        parts = _read_hub(data)
    if "train" not in parts:
        raise UserError(f"{data} has no training rows: it has {', '.join(parts) or 'nothing'}, but no split 'train'.")
    return parts


def _test_rows(data: str, parts: dict[str, Dataset], test: str | None) -> tuple[Dataset | None, str]:
    if test is None:
        name = next((name for name in _TEST_NAMES if name in parts), None)
        return (None, "") if name is None else (parts[name], f"split {name}")
    if test in parts:
        return parts[test], f"split {test}"
    if Path(test).is_file():
        return _read_file(Path(test)), Path(test).name
    raise UserError(f"the test data {test!r} is neither a file nor a split of {data} (it has {', '.join(parts)}).")


def _first(rows: Dataset, limit: int, seed: int) -> Dataset:
    return rows if limit >= len(rows) else rows.shuffle(seed=seed).select(range(limit))


def _read_file(path: Path) -> Dataset:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has an unknown format: use {', '.join(_READERS)} or a folder of images.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty.")
    options: dict[str, Any] = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    if reader == "text":
        options["sample_by"] = "paragraph"
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        _check_lines(path)  # Arrow's reader names no line, and takes lists for rows
    try:
        return load_dataset(reader, data_files=str(path), split="train", **options)
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{path} cannot be read as {reader}: {' '.join(str(cause).split())[:300]}") from None


def _check_lines(path: Path) -> None:
    """Raise `UserError` for the first line that is no JSON object."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from None
            if not isinstance(row, dict):
                raise UserError(f'{path}, line {number}: not an object like {{"text": ..., "label": ...}}.')


def _read_folder(path: Path) -> dict[str, Dataset]:
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix.lower() in _READERS}
    named = {name: file for name, file in files.items() if name in ("train", *_TEST_NAMES)}
    if named:
        return {name: _read_file(file) for name, file in named.items()}
    try:
        return dict(load_dataset("imagefolder", data_dir=str(path)))
    except (DatasetsError, ValueError, OSError):
        raise UserError(
            f"{path} holds neither files named after their split (train.jsonl, dev.csv, test.parquet, ...) nor images "
            "in one subfolder a class."
        ) from None


def _read_hub(data: str) -> dict[str, Dataset]:
    name, _, config = data.partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except (DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{data} is no file or folder here, and as a dataset of the hub it fails: {reason}") from None
    if not isinstance(loaded, DatasetDict):
        raise UserError(f"{data} is a stream; give a dataset with splits.")
    return dict(loaded)
