"""From a loaded model to a ready adapter: time and extra memory of SVD starts on the 36 linear layers of MiniLM.

    python benchmarks/setup.py

"svd" is LAPACK's full decomposition of every weight and nothing else. "pissa" and "srlora" are ours at r = 8 (SRLoRA
looks for the first 4 r directions), "peft-pissa" and "peft-pissa-niter-4" are PEFT's PiSSA by a full and by a
randomised decomposition. Memory is the peak of the process above what it held before.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from paired import RESULTS, Bar, Spread, Table, bars_table, clock, ratio, save, shuffled
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModel

from loratlas import AtlasLoraConfig, SRLoraConfig
from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries
from loratlas.train.demo import demo_model
from loratlas.train.memory import PeakMemory

RANK, SHARE = 8, 0.25
ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "pissa": lambda: AtlasLoraConfig(r=RANK, init_weights="pissa", target_modules="all-linear"),
    "srlora": lambda: SRLoraConfig(r=RANK, r_target=4 * RANK, target_modules="all-linear"),
    "peft-pissa": lambda: LoraConfig(r=RANK, init_lora_weights="pissa", target_modules="all-linear"),
    "peft-pissa-niter-4": lambda: LoraConfig(r=RANK, init_lora_weights="pissa_niter_4", target_modules="all-linear"),
}
ARMS = ("svd", *ADAPTERS)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; one more warms up.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "setup.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    loaded = AutoModel.from_pretrained(demo_model(), add_pooling_layer=False)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    extra: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number, order in enumerate(shuffled(ARMS, rounds + 1)):
        for arm in order:
            took, peak = measure(arm, loaded)
            if number > 0:
                seconds[arm].append(took)
                extra[arm] += [] if peak is None else [peak / 2**20]
    bars = [
        Bar(f"set-up of {arm} / PEFT's PiSSA", SHARE, ratio(seconds[arm], seconds["peft-pissa"]))
        for arm in ("pissa", "srlora")
    ]
    table = table_of(seconds, extra)
    for each in (table, bars_table(bars)):
        each.show(console())
    data = {
        arm: {
            "seconds": asdict(Spread.of(seconds[arm])),
            "extra_mib": asdict(Spread.of(extra[arm])) if extra[arm] else None,
            "over_peft_pissa": asdict(ratio(seconds[arm], seconds["peft-pissa"])),
        }
        for arm in ARMS
    }
    save(out, {"rounds": rounds, "r": RANK, "model": "all-MiniLM-L6-v2", "seed": 0}, data, bars, [table])
    console().print(f"written to {out}")


def measure(arm: str, loaded: nn.Module) -> tuple[float, int | None]:
    """(seconds, extra bytes at the peak or None) of one arm on a fresh copy of the model."""
    model = copy.deepcopy(loaded)
    _give_memory_back()
    before = PeakMemory().bytes()
    memory = PeakMemory()
    took, kept = clock(lambda: make(arm, model))
    peak = memory.bytes()
    del kept
    return took, None if peak is None or before is None else peak - before


def make(arm: str, model: Any) -> Any:
    if arm == "svd":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                torch.linalg.svd(module.weight.detach(), full_matrices=False)
        return None
    return get_peft_model(model, ADAPTERS[arm]())


def _give_memory_back() -> None:
    """So that an arm does not live on memory that the C library kept from an earlier one."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def table_of(seconds: dict[str, list[float]], extra: dict[str, list[float]]) -> Table:
    rows = [
        (
            arm,
            f"{1e3 * Spread.of(seconds[arm]).median:.0f}",
            str(ratio(seconds["peft-pissa"], seconds[arm])),
            str(Spread.of(extra[arm])) if extra[arm] else "–",
        )
        for arm in ARMS
    ]
    return Table("36 linear layers of MiniLM, r = 8", ("arm", "ms", "peft-pissa / arm", "extra memory, MiB"), rows)


if __name__ == "__main__":
    typer.run(main)
