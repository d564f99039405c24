"""The one exception that users are meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message is one sentence that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.

    Attributes:
        field: name of the field of a configuration that is wrong, None where it is not one field.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
