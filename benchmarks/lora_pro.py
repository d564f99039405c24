"""A training step under the optimizers that work on low-rank pairs, against AdamW on the same adapter.

    python benchmarks/lora_pro.py                       # about four minutes
    python benchmarks/lora_pro.py --quick --rounds 1    # does it run?

The encoders of `step.py` with our LoRA, whose factors have moved away from their start.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from arms import QUICK, RANK, SETTINGS, Arm, Setting, make_arm, trained
from paired import RESULTS, Bar, Spread, Table, bars_table, ratio, save, shuffled
from torch import nn
from torch.optim import AdamW, Optimizer

from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries
from loratlas.engine.pair_registry import low_rank_pairs
from loratlas.optim.lora_ggpo import LoraGgpoConfig
from loratlas.optim.lora_pro import LoraProConfig

LR, LIMIT = 1e-4, 1.15
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamW(trained(model), lr=LR, weight_decay=0.0),
    **{f"lora-pro-{mode}": partial(LoraProConfig(mode=mode).build, lr=LR) for mode in ("efficient", "full", "sgd")},
    **{f"lora-{name}": partial(LoraGgpoConfig(method=name).build, lr=LR) for name in ("mgpo", "ggpo")},
}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny encoders, to see that it runs.")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "lora_pro.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    bars, tables, data = [], [], []
    for setting in [each for each in (QUICK if quick else SETTINGS) if each.name.endswith("-fp32")]:
        arms = measure(setting, rounds)
        over = {name: ratio(arm.seconds["step"], arms["adamw"].seconds["step"]) for name, arm in arms.items()}
        bars.append(Bar(f"{setting.name}: step, LoRA-Pro efficient / AdamW", LIMIT, over["lora-pro-efficient"]))
        tables.append(table_of(setting, arms, over))
        tables[-1].show(console())
        data.append(data_of(setting, arms, over))
    bars_table(bars).show(console())
    save(out, {"rounds": rounds, "r": RANK, "quick": quick, "seed": 0}, data, bars, tables)
    console().print(f"written to {out}")


def measure(setting: Setting, rounds: int) -> dict[str, Arm]:
    """Interleaved rounds of two steps each, of which the second is timed, as in `step.py`."""
    arms = {name: arm_of(name, setting) for name in OPTIMIZERS}
    for order in shuffled(list(arms), rounds):
        for name in order:
            arms[name].step()
            for part, seconds in arms[name].step().items():
                arms[name].seconds[part].append(seconds)
    return arms


def arm_of(name: str, setting: Setting) -> Arm:
    arm = make_arm("lora", setting)
    generator = torch.Generator().manual_seed(2)
    for pair in low_rank_pairs(arm.model, "the benchmark"):
        pair.up.copy_(torch.randn(pair.up.shape, generator=generator) * 0.01)
    arm.optimizer = OPTIMIZERS[name](arm.model)
    return arm


def table_of(setting: Setting, arms: dict[str, Arm], over: dict[str, Spread]) -> Table:
    rows = [
        (name, f"{1e3 * statistics.median(arm.seconds['step']):.0f}", f"{1e3 * update_of(arm):.1f}", str(over[name]))
        for name, arm in arms.items()
    ]
    return Table(setting.name, ("optimizer", "step ms", "of it the update", "step, over AdamW's"), rows)


def update_of(arm: Arm) -> float:
    """Median seconds of the optimizer's own part."""
    parts = zip(*(arm.seconds[part] for part in ("step", "forward", "backward")), strict=True)
    return statistics.median(step - forward - backward for step, forward, backward in parts)


def data_of(setting: Setting, arms: dict[str, Arm], over: dict[str, Spread]) -> dict[str, Any]:
    rows = {}
    for name, arm in arms.items():
        seconds = asdict(Spread.of(arm.seconds["step"]))
        rows[name] = {"seconds": seconds, "update": update_of(arm), "over_adamw": asdict(over[name])}
    return {**asdict(setting), "dtype": str(setting.dtype).removeprefix("torch."), "arms": rows}


if __name__ == "__main__":
    typer.run(main)
