"""Checkpoints on disk: which are complete, which is the newest, which may go.

    checkpoint-20/
      ...            whatever was written
      COMPLETE       JSON: step, and size and SHA-256 of every other file

COMPLETE is written last, inside the hidden directory in which a checkpoint grows, and the rename of that directory is
what makes the checkpoint exist. Written after the rename it would leave a moment in which a whole checkpoint counts as
partial. The rename alone would be enough against crashes; the list of checksums is for what happens to files later
(partial copies, failing disks), and for directories that something else has written.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from loratlas.errors import UserError
from loratlas.files import DiskFull, recover, remove_directory, sha256, whole_directory
from loratlas.lock import locked

COMPLETE = "COMPLETE"

_log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_name(step: int) -> str:
    """Name of the directory of one checkpoint; transformers knows it by the same."""
    return f"checkpoint-{step}"


@contextmanager
def whole_checkpoint(target: Path, step: int, *, keep: int | None = None, best: str | None = None) -> Iterator[Path]:
    """Yield a directory to write a checkpoint into; it becomes `target` if the block ends without error.

    In a distributed run every rank enters, and all get the directory that rank 0 has made.

    Args:
        keep: how many complete checkpoints stay, see `rotate`; best: name of one that stays in any case.

    Raises:
        UserError: another process is writing beside it. `DiskFull` names the newest checkpoint that is there.
    """
    ranks = dist.is_available() and dist.is_initialized()
    if ranks and dist.get_rank() > 0:
        shared = [""]
        dist.broadcast_object_list(shared)
        yield Path(shared[0])
        dist.barrier()
    else:
        try:
            with locked(target.parent):
                with whole_directory(target) as folder:
                    if ranks:
                        dist.broadcast_object_list([str(folder)])
                    yield folder
                    if ranks:
                        dist.barrier()  # every rank has written its part
                    _seal(folder, step)
                rotate(target, keep, best)
                recover(target.parent)
        except DiskFull as error:
            raise DiskFull(target, error.reason, _what_is_left(target.parent)) from error
    if ranks:
        dist.barrier()  # no rank goes on before the checkpoint has its name


def newest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint with the highest step in `directory`, None if there is none.

    Newer ones that are partial or damaged are skipped; one logged warning names them and says what is wrong.
    """
    skipped: list[str] = []
    for path in _candidates(Path(directory)):
        fault = fault_of(path)
        if fault is None:
            break
        skipped.append(f"{path.relative_to(directory)} ({fault})")
    else:
        path = None
    if skipped:
        _log.warning(
            "skipped in %s: %s; %s.",
            directory,
            ", ".join(skipped),
            "no complete checkpoint is left" if path is None else f"the newest complete checkpoint is {path.name}",
        )
    return path


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None if all are there and as they were written."""
    if checkpoint.suffix == ".tmp":
        return "its writing was interrupted"
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
        listed = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"no {COMPLETE} in it"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} is damaged"
    for name, size, checksum in listed:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256(file) != checksum:
            return f"{name} is damaged"
    return None


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest complete one in it.

    Raises:
        UserError: there is none, or `path` is one that is not complete.
    """
    directory = Path(path)
    if (directory / COMPLETE).is_file() or (_NAME.fullmatch(directory.name) and directory.is_dir()):
        fault = fault_of(directory)
        if fault is not None:
            raise UserError(f"the checkpoint {directory} is not complete ({fault}): resume from another.")
        return directory
    newest = newest_checkpoint(directory) if directory.is_dir() else None
    if newest is None:
        raise UserError(f"{directory} holds no checkpoint to resume from.")
    return newest


def rotate(newest: Path, keep: int | None, best: str | None = None) -> None:
    """Remove the oldest complete checkpoints beside `newest` until `keep` are left; None keeps all.

    Called when `newest` is complete. It stays whatever happens, as does `best`. What has no COMPLETE is not ours to
    remove.
    """
    if keep is None or keep < 1:
        return
    there = [path for path in _candidates(newest.parent) if _NAME.fullmatch(path.name) and (path / COMPLETE).is_file()]
    stay = {newest.name, best or newest.name}
    free = [path for path in there if path.name not in stay]
    surplus = len(there) - max(keep, len(stay))
    for path in free[len(free) - surplus :] if surplus > 0 else ():
        remove_directory(path)


def _candidates(directory: Path) -> Iterator[Path]:
    """Checkpoints of `directory`, newest first, with those that a crash left on their way in or out."""
    places = (*directory.glob("checkpoint-*"), *directory.glob(".checkpoint-*.????????.*"))
    found: list[tuple[int, bool, Path]] = []
    for path in places:
        match = _NAME.fullmatch(path.name) or _NAME.match(path.name[1:])
        if match and path.is_dir():
            moved = path / match[0] if path.suffix == ".old" else path
            found.append((int(match[1]), path.name[0] != ".", moved))
    return (path for *_, path in sorted(found, reverse=True))


def _seal(folder: Path, step: int) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (folder / COMPLETE).write_text(json.dumps({"step": step, "files": sums}, indent=1) + "\n", encoding="utf-8")


def _what_is_left(directory: Path) -> str:
    there = next((path for path in _candidates(directory) if fault_of(path) is None), None)
    if there is None:
        return "there is no earlier checkpoint: free some space and start again"
    return f"{there.name} is complete and untouched: free some space and resume from it"
