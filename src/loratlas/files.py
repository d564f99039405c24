"""Atomic writes: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratlas.errors import UserError

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DiskFull(UserError):
    """`target` could not be written because the disk or a quota is full; `reason` is the system's word for it."""

    def __init__(self, target: Path, reason: str, kept: str = "what was there before is unchanged") -> None:
        super().__init__(f"the disk is full ({reason}): {target} could not be written; {kept}.")
        self.target = target
        self.reason = reason


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 beside `path`, fsync it, then rename it over `path`; a full disk raises `DiskFull`."""
    target = Path(path)
    with naming_a_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes private files; results are meant to be shared
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(target.parent)
    return target


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused because JSON has none."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory of the same name near `path`; when the block ends without error it takes `path`'s place.

    An earlier directory at `path` is moved aside first and removed last, so that a crash at any moment leaves either
    the old or the new contents complete on disk; `recover` tidies up after one.

    Raises:
        UserError: there is a file at `path`. `DiskFull`: also where another library did the writing.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give the name of a directory to write into.")
    with naming_a_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = _aside(target, "tmp")
        fresh = stage / target.name
        try:
            fresh.mkdir()
            yield fresh
            # before the rename: a file system may put the new name on disk ahead of the bytes behind it
            for entry in (*fresh.rglob("*"), fresh):
                _sync(entry)
            old = None
            if target.exists():
                old = _aside(target, "old")
                os.replace(target, old / target.name)
            os.replace(fresh, target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        stage.rmdir()
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Remove a directory under another name, so that a crash in between leaves no part of it under its own."""
    target = Path(path)
    hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    os.replace(target, hidden)
    shutil.rmtree(hidden)


def recover(parent: str | os.PathLike[str]) -> None:
    """Tidy up what a killed process left in `parent`; only for its one writer, see `lock.locked`.

    Unfinished writes are removed. A directory that had been moved aside goes back if its replacement never arrived.
    """
    for stage in (entry for end in ("old", "tmp") for entry in Path(parent).glob(f".*.????????.{end}")):
        for entry in stage.iterdir() if stage.suffix == ".old" else ():
            if not (stage.parent / entry.name).exists():
                os.replace(entry, stage.parent / entry.name)
        shutil.rmtree(stage) if stage.is_dir() else stage.unlink()


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _aside(target: Path, suffix: str) -> Path:
    """A new hidden directory beside `target`."""
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=f".{suffix}"))
    os.chmod(made, 0o755)
    return made


@contextlib.contextmanager
def naming_a_full_disk(target: Path) -> Iterator[None]:
    """Turn what the block raises on a full disk into `DiskFull` about `target`."""
    try:
        yield
    except Exception as error:
        # libraries written in Rust (safetensors, tokenizers) say it in their message only
        said = re.search(r"os error (\d+)", str(error))
        code = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if code not in _FULL or isinstance(error, DiskFull):
            raise
        raise DiskFull(target, os.strerror(code)) from error


def _sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, durable; Windows cannot open directories for that."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
