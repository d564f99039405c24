"""Ctrl-C and SIGTERM as a wish to stop at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_NOTICE = b"\nstopping after this step, with a checkpoint; once more leaves at once, without\n"


class Stopped(KeyboardInterrupt):
    """Training ended on request after optimizer step `step`; `checkpoint` is complete on disk."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}, checkpoint in {checkpoint}")
        self.step = step
        self.checkpoint = checkpoint


class Stop:
    """Whether a run should end. As a context manager it listens to SIGINT and SIGTERM, in the main thread only.

    The first signal sets `requested`; `run` then finishes its step, writes a checkpoint and raises `Stopped`. The
    second raises KeyboardInterrupt where the program stands. The earlier handlers come back at the end of the block.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _NOTICE)  # a print would fail if the signal came in the middle of another
