"""Peak memory of a stretch of work: of the GPU where there is one, else of the process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts counting when it is made.

    On CUDA the peak of allocated bytes on all devices; on Linux the process's peak resident set since then, which
    includes the model and the libraries; elsewhere nothing is known and `bytes` gives None.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._known = self._cuda
        if self._cuda:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text("5")  # resets the high-water mark, see proc(5)
                self._known = True
            except OSError:
                self._known = False

    def bytes(self) -> int | None:
        if not self._known:
            return None
        if self._cuda:
            return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(found[1]) * 1024 if found else None
