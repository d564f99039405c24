"""What gathering the gradient's directions adds to a training step of SRLoRA.

    python benchmarks/sketch.py                       # about three minutes of CPU time
    python benchmarks/sketch.py --quick --rounds 1    # does it run?

The encoders of `step.py` under `srlora-gradient`. One and the same model gathers its sketch in one step of a round and
not in the other, in random order; every timed step follows one of its kind. No event falls into them. Seconds are those
of the process's CPU time, which other work on the machine touches little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
import typer
from arms import LONG, QUICK, RANK, SETTINGS, Arm, Setting, adapted_arm
from paired import RESULTS, Bar, Spread, Table, bars_table, ratio, save, shuffled
from step_options import Out, Quick, Rounds, SettingNames, Threads

from loratlas import SRLoraConfig
from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries
from loratlas.engine import reservoir
from loratlas.engine.model import atlas_layers

LIMIT = 1.03
PROBES: dict[str, int | None] = {"gathers": 0, "does not": None}


def main(
    rounds: Rounds = 9,
    threads: Threads = 1,
    setting: SettingNames = None,
    quick: Quick = False,
    out: Out = RESULTS / "sketch.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    bars, tables, data = [], [], []
    for each in QUICK if quick else SETTINGS:
        if each.dropout or (setting and each.name not in setting):
            continue
        seconds = measure(each, rounds)
        over = ratio(seconds["gathers"], seconds["does not"])
        bars.append(Bar(f"{each.name}: a step that gathers / one that does not", LIMIT, over))
        tables.append(table_of(each, seconds, over))
        tables[-1].show(console())
        data.append(data_of(each, seconds, over))
    bars_table(bars).show(console())
    save(out, {"rounds": rounds, "r": RANK, "quick": quick, "seed": 0}, data, bars, tables)
    console().print(f"written to {out}")


def measure(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of steps, one a round, and of drawing all probes, which happens once an event ("draw")."""
    svd: dict[str, Any] = {"svd_method": "lowrank", "svd_niter": 1}
    config = SRLoraConfig.gradient(r=RANK, r_target=2 * RANK, target_modules="all-linear", **svd)
    arm = adapted_arm(config, setting, LONG)
    layers = [layer.view("default") for _, layer in atlas_layers(arm.model)]
    seconds: dict[str, list[float]] = {"draw": [], **{name: [] for name in PROBES}}
    for order in shuffled(list(PROBES), rounds):
        for name in order:
            draws = [(layer, PROBES[name]) for layer in layers]
            for _ in range(2):  # the second is timed; the plan, which has no event near, takes the probes away again
                draw = cpu_seconds(partial(reservoir.watch, draws))
                step = cpu_seconds(partial(take, arm))
            seconds[name].append(step)
            if name == "gathers":
                seconds["draw"].append(draw)
    if not all(layer.sketch.any() for layer in layers):
        raise RuntimeError("a layer has gathered nothing: the measurement is worth nothing")
    return seconds


def take(arm: Arm) -> None:
    """One step."""
    arm.loss().backward()
    arm.update()


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def table_of(setting: Setting, seconds: dict[str, list[float]], over: Spread) -> Table:
    draw = 1e3 * median(seconds["draw"])
    rows = [(name, f"{1e3 * median(seconds[name]):.0f}") for name in PROBES]
    title = f"{setting.name}; the draw of the probes: {draw:.1f} ms an event"
    return Table(title, ("a step that", "CPU ms"), rows)


def data_of(setting: Setting, seconds: dict[str, list[float]], over: Spread) -> dict[str, Any]:
    spreads = {name: asdict(Spread.of(values)) for name, values in seconds.items()}
    return {
        **asdict(setting),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "seconds": spreads,
        "over_plain": asdict(over),
    }


if __name__ == "__main__":
    typer.run(main)
