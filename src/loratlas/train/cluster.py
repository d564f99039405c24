"""Runs on a Ray cluster, one task a run. Needs the extra `cluster`.

Every machine must see the data, the model and the output directory under the same paths (a shared file system).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from loratlas.errors import UserError
from loratlas.train.jobs import Job, Outcome, Source, attempt
from loratlas.train.progress import Progress
from loratlas.train.results import RunResult
from loratlas.train.workers import Sender, replay

_PAUSE = 0.5  # seconds between looks at what the runs have said


class OnCluster:
    """As many runs at the same time as the cluster has room for; each takes one GPU where there are any.

    Args:
        address: "auto" for a running cluster or else a local one, "local", or the address of the head node.

    Raises:
        UserError: Ray is not installed, or there is no cluster at that address.
    """

    def __init__(self, source: Source, address: str) -> None:
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError:
            raise UserError('a cluster needs Ray: pip install "loratlas[cluster]".') from None
        self._source = source
        self._mine = not ray.is_initialized()
        if self._mine:
            where = None if address == "auto" else address
            try:
                ray.init(where, log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"there is no Ray cluster at {address!r}: {reason}") from None
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_remote_attempt)
        self._queue = Queue(actor_options={"num_cpus": 0})
        self._running: dict[Any, tuple[int, Job]] = {}

    def run(self, jobs: Iterable[Job], progress: Progress) -> Iterator[Outcome]:
        import ray
        from ray.exceptions import RayError

        told: list[Progress | None] = []
        for number, job in enumerate(jobs):
            told.append(None)
            self._running[self._remote.remote(number, job, self._source, self._queue)] = number, job
        while self._running:
            ready, _ = ray.wait(list(self._running), timeout=_PAUSE)
            for number, message in self._queue.get_nowait_batch(self._queue.qsize()):
                listener = told[number] = told[number] or progress.one_run()
                replay(message, listener)
            for reference in ready:
                _, job = self._running.pop(reference)
                try:
                    outcome: RunResult | str = ray.get(reference)
                except RayError as error:
                    outcome = f"its Ray task ended before the run did: {' '.join(str(error).split())[:300]}"
                yield job, outcome

    def close(self) -> None:
        import ray

        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running.clear()
        self._queue.shutdown(force=True)
        if self._mine:
            ray.shutdown()


def _remote_attempt(number: int, job: Job, source: Source, queue: Any) -> RunResult | str:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # which Ray sets to the CPUs of the task

    def send(message: tuple[Any, ...]) -> None:
        if message[0] != "step":  # a call across machines for each step would cost more than it tells
            queue.put((number, message))

    return attempt(job, source, Sender(send), shared=True)
