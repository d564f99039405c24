"""Labels of any type as class numbers, or as floats for regression."""

from __future__ import annotations

from typing import Any, NamedTuple

from datasets import Value

from loratlas.errors import UserError
from loratlas.train.columns import Columns, is_class_label
from loratlas.train.tables import Tables


class Labels(NamedTuple):
    """Names of the classes in the order of their numbers; None for regression."""

    names: list[str] | None


def encode_labels(tables: Tables, columns: Columns, name: str) -> tuple[Tables, Labels]:
    """Replace the label column by a column "labels" that holds class numbers (int) or floats.

    Raises:
        UserError: a row without label, a label that is no number (regression), or one of the test rows that never
            occurs in training.
    """
    column = str(columns.label)
    train, test = tables.train[column], tables.test[column]
    for part, values in (("training", train), ("test", test)):
        empty = next((row for row, value in enumerate(values) if value is None or value == ""), None)
        if empty is not None:
            raise UserError(f"{part} row {empty + 1} of {name} has no {column}.")
    if columns.task == "regression":
        numbers = [_floats(values, column, part, name) for part, values in (("training", train), ("test", test))]
        return _replaced(tables, column, numbers, "float32"), Labels(None)
    known = sorted(set(train), key=lambda value: (str(type(value)), value))
    if len(known) < 2:
        raise UserError(f"the training rows of {name} have only one {column} ({known[0]!r}): nothing can be learned.")
    if is_class_label(tables.train, column):
        names = list(tables.train.features[column].names)
        known = list(range(len(names)))
    else:
        names = [str(value) for value in known]
    number = {value: index for index, value in enumerate(known)}
    unseen = next((row for row, value in enumerate(test) if value not in number), None)
    if unseen is not None:
        raise UserError(
            f"test row {unseen + 1} of {name} has the {column} {test[unseen]!r}, which never occurs in training."
        )
    encoded = [[number[value] for value in values] for values in (train, test)]
    return _replaced(tables, column, encoded, "int64"), Labels(names)


def _floats(values: Any, column: str, part: str, name: str) -> list[float]:
    result = []
    for row, value in enumerate(values, start=1):
        try:
            result.append(float(value))
        except (TypeError, ValueError):
            raise UserError(f"{part} row {row} of {name} has the {column} {value!r}, which is not a number.") from None
    return result


def _replaced(tables: Tables, column: str, values: list[list[Any]], dtype: str) -> Tables:
    train, test = (
        rows.remove_columns(column).add_column("labels", new).cast_column("labels", Value(dtype))
        for rows, new in zip((tables.train, tables.test), values, strict=True)
    )
    return Tables(train, test, tables.split)
