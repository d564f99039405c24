"""One writer a directory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from loratlas.errors import UserError
from loratlas.files import naming_a_full_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `path`/.lock while the block runs; the system lets go of it when the process dies, however it dies.

    The directory is made if need be, and an empty one is removed again. Where the platform or the file system has no
    such locks there is nothing to hold, and the block runs.

    Raises:
        UserError: another process holds it; the sentence names its pid and host.
    """
    directory = Path(path)
    made = not directory.exists()
    with naming_a_full_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = _acquire(directory)
    try:
        yield
    finally:
        if handle is not None:
            # removed while still held, so that nobody holds a lock on a file that another is about to remove
            (directory / LOCK).unlink(missing_ok=True)
            os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _acquire(directory: Path) -> int | None:
    if fcntl is None:
        return None
    file = directory / LOCK
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 4096)
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{directory} is being written by {_name(holder)}: wait for it to end, or choose another directory."
                ) from None
            return None  # network file systems without locks
        if _is_still(file, handle):
            with contextlib.suppress(OSError):  # the name is a courtesy, and does without room on the disk
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            return handle
        os.close(handle)  # its holder removed it between our opening and our locking


def _is_still(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _name(holder: bytes) -> str:
    try:
        who = json.loads(holder)
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
