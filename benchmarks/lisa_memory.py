"""Peak memory and time of LISA beside LoRA and full training, each arm in a process of its own.

    python benchmarks/lisa_memory.py               in fp32 on the CPU or the GPU that there is
    python benchmarks/lisa_memory.py --offload     with LISA's "offload", which differs from "keep" on a GPU only
    python benchmarks/lisa_memory.py --quick       a tiny model, to see that it runs

`measure(arm, setting)` is what other benchmarks need: one arm, here, in this process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from paired import RESULTS, Bar, Spread, Table, ratio, save, shuffled
from peft import get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from loratlas import AtlasLoraConfig, LisaConfig, attach
from loratlas.strategies.footprint import state_of
from loratlas.train.memory import PeakMemory

ARMS = ("full", "lora-r8", "lora-r128", "lisa-keep", "lisa-drop")
_MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """A Llama with random weights. steps: of training, in `steps // interval` periods of LISA."""

    width: int = 512
    layers: int = 8
    vocabulary: int = 2000
    batch: int = 2
    length: int = 64
    active: int = 2
    interval: int = 2
    steps: int = 16


QUICK = Setting(width=32, layers=4, vocabulary=100, batch=2, length=8, active=1, steps=4)


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds. peak: of the process or the GPU above what the model itself takes; state: the optimizer's at
    the end, on the device; step: the median step."""

    peak: int
    state: int
    step: float


def measure(arm: str, setting: Setting) -> Measured:
    """Train `setting.steps` steps of one arm in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    heads = max(1, setting.width // 64)
    config = LlamaConfig(
        hidden_size=setting.width,
        intermediate_size=8 * setting.width // 3,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=setting.vocabulary,
    )
    model: Any = LlamaForCausalLM(config).to(device)
    start = _in_use()
    model, optimizer = _prepared(arm, model, setting)
    memory, seconds = PeakMemory(), []
    for step in range(setting.steps):
        ids = _batch(setting, step).to(device)
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Measured((memory.bytes() or 0) - start, state_of(optimizer), median(seconds))


def _prepared(arm: str, model: Any, setting: Setting) -> tuple[Any, torch.optim.Optimizer]:
    name, _, how = arm.partition("-")
    if name == "lora":
        model = get_peft_model(model, AtlasLoraConfig(r=int(how[1:]), target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    if name == "lora":
        attach(model, optimizer)
    if name == "lisa":
        options = {"num_active_layers": setting.active, "interval_steps": setting.interval, "optimizer_state": how}
        LisaConfig(**options).build().attach(model, optimizer)
    return model, optimizer


def _batch(setting: Setting, step: int) -> torch.Tensor:
    size = (setting.batch, setting.length)
    return torch.randint(0, setting.vocabulary, size, generator=torch.Generator().manual_seed(step))


def _in_use() -> int:
    """Bytes now: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def apart(arm: str, setting: Setting) -> Measured:
    """`measure` in a process of its own, so that no arm inherits the heap of another."""
    # forked: this process has neither trained nor touched a GPU, and the child need not import everything again
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (arm, setting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "lisa_memory.json")
    options = parser.parse_args()
    setting = QUICK if options.quick else Setting()
    arms = (*ARMS, "lisa-offload") if options.offload else ARMS
    found: dict[str, list[Measured]] = {arm: [] for arm in arms}
    for order in shuffled(arms, options.rounds):
        for arm in order:
            found[arm].append(apart(arm, setting))
    table = _table(found)
    bars = _bars(found)
    data = {arm: [asdict(each) for each in rows] for arm, rows in found.items()}
    table.show(Console())
    if not options.quick:
        save(options.out, {"rounds": options.rounds, **asdict(setting)}, data, bars, [table])


def _bars(found: dict[str, list[Measured]]) -> list[Bar]:
    peaks = {arm: [float(each.peak) for each in rows] for arm, rows in found.items()}
    return [
        Bar("LISA, drop: peak over full training's", 0.6, ratio(peaks["lisa-drop"], peaks["full"])),
        Bar("LISA, drop: peak over that of LoRA r=128", 1.2, ratio(peaks["lisa-drop"], peaks["lora-r128"])),
    ]


def _table(found: dict[str, list[Measured]]) -> Table:
    rows = []
    for arm, measured in found.items():
        peak, state = (Spread.of(getattr(each, name) / _MIB for each in measured) for name in ("peak", "state"))
        time_ = ratio([each.step for each in measured], [each.step for each in found["full"]])
        rows.append((arm, str(peak), f"{state.median:.3g}", str(time_)))
    head = ("arm", "peak beside the weights, MiB", "optimizer's state at the end, MiB", "step time (full = 1)")
    return Table("LISA, LoRA and full training", head, rows)


if __name__ == "__main__":
    main()
