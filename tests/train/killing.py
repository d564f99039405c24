"""A fork server for `test_kill.py`: imports everything once, then runs each line of its input in a fork.

Input, one JSON object a line: {"out": directory, "resume": bool}. Output, a line each: "pid N" when a run starts,
"step N" after an optimizer step, "sync" before every fsync, "end STATUS" when it is over.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import small
import torch

from loratlas import UserError, files
from loratlas.train.data import TaskData, load_task
from loratlas.train.progress import Progress
from loratlas.train.run import RunSpec, run
from loratlas.train.tables import read_tables


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Told(Progress):
    def step(self, step: int, loss: float) -> None:
        say("step", step)


def slow_sync(path: Path, sync: Any = files._sync) -> None:
    """Stretches saves, so that kills fall inside them."""
    say("sync")
    time.sleep(0.002)
    sync(path)


def work(job: dict[str, Any], bert: str, reviews: TaskData) -> None:
    files._sync = slow_sync
    settings: dict[str, Any] = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "options": {"r": 2}}
    spec = RunSpec("srlora", bert, job["out"], save_every=2, **settings)
    try:
        run(spec, reviews, Told(), resume=job["resume"])
    except UserError as error:
        if "holds no checkpoint" not in str(error):
            raise
        run(spec, reviews, Told())  # killed before the first


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    bert = small.bert(folder / "bert")
    path = small.write_jsonl(folder / "reviews.jsonl", small.reviews(120))
    reviews = load_task(read_tables(path), bert, name="reviews")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(json.loads(line), bert, reviews)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        say("pid", child)
        say("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
