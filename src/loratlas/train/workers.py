"""Runs in local processes. Each loads the work once and then does one run after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from loratlas.train.jobs import Job, Outcome, Source, attempt
from loratlas.train.progress import Progress
from loratlas.train.results import RunResult

_EVENTS = ("started", "step", "evaluated", "finished")


class Sender(Progress):
    """Sends every call as (name, arguments) through a pipe or queue."""

    def __init__(self, send: Any) -> None:
        self._send = send

    def started(self, label: str, steps: int) -> None:
        self._send(("started", label, steps))

    def step(self, step: int, loss: float) -> None:
        self._send(("step", step, loss))

    def evaluated(self, step: int, metric: str, value: float) -> None:
        self._send(("evaluated", step, metric, value))

    def finished(self, result: RunResult) -> None:
        self._send(("finished", result))


def replay(message: tuple[Any, ...], progress: Progress) -> bool:
    """Make the call that a `Sender` sent; False if `message` is none."""
    name, *arguments = message
    if name not in _EVENTS:
        return False
    getattr(progress, name)(*arguments)
    return True


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    progress: Progress | None = None


class InProcesses:
    """Up to `processes` runs at the same time.

    Processes are spawned, not forked, because torch's threads and CUDA do not survive a fork. A process that dies takes
    its run with it and is replaced; when this process ends, in whatever way, they end at their next step.
    """

    def __init__(self, source: Source, processes: int) -> None:
        self._source, self._processes = source, processes
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, jobs: Iterable[Job], progress: Progress) -> Iterator[Outcome]:
        waiting = deque(jobs)
        while waiting or any(worker.job for worker in self._workers):
            self._hand_out(waiting, progress)
            busy = [worker for worker in self._workers if worker.job is not None]
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe in ready:
                    outcome = self._listen(worker)
                    if outcome is not None:
                        yield outcome

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # ends the idle ones
            if worker.job is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def _hand_out(self, waiting: deque[Job], progress: Progress) -> None:
        while waiting:
            worker = next((worker for worker in self._workers if worker.job is None), None)
            if worker is None:
                if len(self._workers) == self._processes:
                    return
                worker = self._start()
            worker.job, worker.progress = waiting.popleft(), progress.one_run()
            with contextlib.suppress(OSError):  # it has died meanwhile, which `_listen` will report
                worker.pipe.send(worker.job)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        taken = {worker.number for worker in self._workers}
        number = next(number for number in range(self._processes) if number not in taken)
        process = self._context.Process(target=_work, args=(theirs, self._source, number, self._processes), daemon=True)
        process.start()
        theirs.close()  # or a dead worker would not be noticed
        worker = _Worker(number, process, ours)
        self._workers.append(worker)
        return worker

    def _listen(self, worker: _Worker) -> Outcome | None:
        """One message of a busy worker; its run's outcome if that is what came."""
        job, progress = worker.job, worker.progress
        assert job is not None
        assert progress is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            worker.process.join()
            return job, _death(worker.process.exitcode)
        if replay(message, progress):
            return None
        worker.job = worker.progress = None
        return job, message[1]


def _work(pipe: Connection, source: Source, number: int, count: int) -> None:
    """A worker's life: jobs come in, calls of `Progress` and outcomes go out, until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, but the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with all temporary files removed
    _take_share(number, count)

    def send(message: tuple[Any, ...]) -> None:
        try:
            pipe.send(message)
        except OSError:
            raise SystemExit(1) from None  # the parent is gone

    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        send(("outcome", attempt(job, source, Sender(send), shared=count > 1)))


def _take_share(number: int, count: int) -> None:
    """One of the GPUs, and a fair part of the cores, without which `count` processes would fight for all of them."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if gpus != [""]:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // count)))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        cause = f"was ended by {signal.Signals(-code).name}"
        return f"its process {cause}" + (": perhaps memory ran out; try fewer processes." if code == -9 else ".")
    return f"its process ended with status {code} before the run did."
