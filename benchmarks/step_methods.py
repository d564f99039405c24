"""A training step of every method against one of our LoRA: as many trained parameters, or the same largest rank.

    python benchmarks/step_methods.py                            # all of them, about six minutes
    python benchmarks/step_methods.py --method salt --dtype fp32 --rounds 3

The encoders, the batch and the way to time are those of `step.py`, at width 384; methods have r = 8. The LoRA that a
method is measured against has the rank whose parameters come closest to the method's, which is 1 for those that train
a few numbers a layer; for methods that choose among the ranks of one LoRA it is r = 8, or the rank they may grow to.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from arms import QUICK, RANK, SETTINGS, Arm, Setting, make_arm, trained
from paired import RESULTS, Bar, Spread, Table, bars_table, ratio, save
from step import take_turns
from step_options import Out, Quick, Rounds, Threads

from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries

LIMIT = 1.15
# against a LoRA of as many parameters
PARAMETERS = ("svfit", "salt", "lamda", "nlora", "lora-sb", "lora-ga", "loldu", "soka", "lora-xs")
# against a LoRA of the largest rank
RANKS = ("increlora", "triadaptlora", "sora", "dylora", "diffora", "codyra", "allora")
# {method: why its step has to take longer}
REASONS = {
    "salt": "its update is of full rank: the core of n x n goes through all n singular directions",
    "soka": "its update is of full rank: a third product with W's size, for the gradient of the sum of its terms",
    "increlora": "every score takes the whole gradient of W, a third product of its size, as long as ranks grow",
}


def main(
    rounds: Rounds = 5,
    threads: Threads = 1,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods of the catalogue; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only fp32 or bf16.")] = None,
    quick: Quick = False,
    out: Out = RESULTS / "step_methods.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    bars: list[Bar] = []
    tables: list[Table] = []
    data: list[dict[str, Any]] = []
    slow: set[str] = set()
    for setting in _chosen(QUICK if quick else SETTINGS, dtype):
        arms, against = measure(setting, method or [*PARAMETERS, *RANKS], rounds)
        bars += bars_of(setting, arms, against)
        tables.append(table_of(setting, arms, against))
        tables[-1].show(console())
        data.append(data_of(setting, arms, against))
        slow |= {name for name, bar in zip(against, bars[-len(against) :], strict=True) if not bar.met}
    if slow & set(REASONS):
        tables.append(reasons_table(sorted(slow & set(REASONS))))
        tables[-1].show(console())
    bars_table(bars).show(console())
    save(out, {"rounds": rounds, "r": RANK, "quick": quick, "seed": 0}, data, bars, tables)
    console().print(f"written to {out}")


def _chosen(settings: list[Setting], dtypes: list[str] | None) -> list[Setting]:
    for name in dtypes or ():
        if name not in ("fp32", "bf16"):
            raise typer.BadParameter(f"there is no dtype {name!r}: choose fp32 or bf16")
    narrow = min(each.width for each in settings)
    plain = [each for each in settings if each.width == narrow and not each.dropout]
    return [each for each in plain if not dtypes or each.name.rpartition("-")[2] in dtypes]


def measure(setting: Setting, methods: Iterable[str], rounds: int) -> tuple[dict[str, Arm], dict[str, str]]:
    """(all arms, {method: the LoRA among them that it is measured against})."""
    arms = {name: make_arm(name, setting) for name in methods}
    each_rank = parameters(make_arm("lora", setting, r=1))
    against = {}
    for name, arm in list(arms.items()):
        rank = RANK if name in RANKS else max(1, round(parameters(arm) / each_rank))
        against[name] = f"lora, r = {rank}"
        if against[name] not in arms:
            arms[against[name]] = make_arm("lora", setting, rank)
    take_turns(arms, rounds)
    return arms, against


def parameters(arm: Arm) -> int:
    return sum(p.numel() for p in trained(arm.model))


def bars_of(setting: Setting, arms: dict[str, Arm], against: dict[str, str]) -> list[Bar]:
    bars = []
    for name, lora in against.items():
        cost = ratio(arms[name].seconds["step"], arms[lora].seconds["step"])
        bars.append(Bar(f"{setting.name}: step, {name} / our {lora.replace('lora', 'LoRA')}", LIMIT, cost))
    return bars


def reasons_table(methods: Iterable[str]) -> Table:
    return Table("Why a step takes longer", ("method", ""), [(name, REASONS[name]) for name in methods])


def table_of(setting: Setting, arms: dict[str, Arm], against: dict[str, str]) -> Table:
    rows = []
    for name, lora in against.items():
        own, other = arms[name], arms[lora]
        parts = [str(ratio(own.seconds[part], other.seconds[part])) for part in ("step", "forward", "backward")]
        counts = [f"{parameters(own):,}", lora.removeprefix("lora, "), f"{parameters(other):,}"]
        saved = [f"{own.saved_bytes / 2**20:.1f}", f"{other.saved_bytes / 2**20:.1f}"]
        rows.append((name, *counts, f"{1e3 * statistics.median(own.seconds['step']):.0f}", *parts, *saved))
    times = ("step ms", "step / LoRA", "forward / LoRA", "backward / LoRA")
    head = ("method", "trained", "LoRA", "it trains", *times, "saved MiB", "LoRA's")
    return Table(setting.name, head, rows)


def data_of(setting: Setting, arms: dict[str, Arm], against: dict[str, str]) -> dict[str, Any]:
    rows = {}
    for name, arm in arms.items():
        times = {part: asdict(Spread.of(seconds)) for part, seconds in arm.seconds.items()}
        rows[name] = {"parameters": parameters(arm), "saved_bytes": arm.saved_bytes, "seconds": times}
        if name in against:
            other = arms[against[name]].seconds
            over = {part: asdict(ratio(seconds, other[part])) for part, seconds in arm.seconds.items()}
            rows[name] |= {"against": against[name], "over": over}
    return {**asdict(setting), "dtype": str(setting.dtype).removeprefix("torch."), "arms": rows}


if __name__ == "__main__":
    typer.run(main)
