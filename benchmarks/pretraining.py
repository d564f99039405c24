"""Pretraining a small Llama from scratch: full rank, low rank, SLTrain, and the catalogue's ways to train all weights.

    python benchmarks/pretraining.py --data input.txt         # all arms and seeds; go on with the same command
    python benchmarks/pretraining.py --data input.txt --arm sltrain --arm adamw
    python benchmarks/pretraining.py --data input.txt --quick --out quick       # does it run?

A byte-level model on one text, its last tenth for validation; all arms see the same batches of a seed for the same
number of steps, under one schedule (a tenth of warm-up, cosine down to a tenth). Each arm runs at every rate of its
grid with the first seed, and at rates beyond while the best is the outermost; with the other seeds it runs at the rate
whose last validation loss was lowest. Low rank and SLTrain have as many parameters as one another. Every run is a file
in --out, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from paired import RESULTS, Bar, Spread, Table, bars_table, ratio, save
from rich.console import Console
from sltrain import low_rank
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from loratlas import DCTAdamWConfig, FiraConfig, GaLoreConfig, LisaConfig, SLTrainConfig, replace_linears
from loratlas.engine.parts import OptimizerConfig
from loratlas.errors import UserError
from loratlas.files import write_json
from loratlas.strategies.footprint import state_of

SEEDS = (0, 1, 2)
INNER = ["attn", "mlp"]  # parts of the paths of the layers that low rank and SLTrain replace


@dataclass(frozen=True)
class Setting:
    """The model and its training. rank, alpha, density: of SLTrain; projection, gap: of the subspace optimizers."""

    width: int = 128
    inner: int = 344
    layers: int = 4
    heads: int = 4
    batch: int = 8
    length: int = 64
    steps: int = 450
    every: int = 50
    validation: int = 64
    rank: int = 24
    alpha: float = 24.0
    density: float = 0.1
    projection: int = 32
    gap: int = 50
    lisa_active: int = 1
    lisa_interval: int = 20


QUICK = Setting(
    width=16, inner=24, layers=2, heads=2, length=16, steps=6, every=3, validation=8, rank=3, projection=4, gap=2
)


@dataclass(frozen=True)
class Arm:
    """How one arm trains. prepare: changes the model of a seed; build: its optimizer; rates: the grid."""

    rates: tuple[float, ...]
    prepare: Callable[[nn.Module, Setting, int], Any] = lambda model, setting, seed: None
    build: Callable[[Setting], OptimizerConfig] | None = None
    lisa: bool = False

    def optimizer(self, model: nn.Module, setting: Setting, rate: float) -> Optimizer:
        if self.build is not None:
            return self.build(setting).build(model, lr=rate)
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)


def to_low_rank(model: nn.Module, setting: Setting, seed: int) -> None:
    """W = B A in the place of every layer that SLTrain would replace, both factors with PyTorch's start."""
    for path, linear in [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if any(part in path for part in INNER):
            n_in, n_out = linear.in_features, linear.out_features
            k = low_rank(n_in, n_out, setting.rank, setting.density)
            model.set_submodule(path, nn.Sequential(nn.Linear(n_in, k, bias=False), nn.Linear(k, n_out, bias=False)))


def to_sltrain(model: nn.Module, setting: Setting, seed: int) -> None:
    options = {"r": setting.rank, "lora_alpha": setting.alpha, "density": setting.density, "seed": seed}
    replace_linears(model, SLTrainConfig(target_modules=INNER, **options))


def subspace(config: type[Any]) -> Callable[[Setting], OptimizerConfig]:
    return lambda setting: config(r=setting.projection, update_proj_gap=setting.gap)


ARMS = {
    "adamw": Arm((0.001, 0.003, 0.01)),
    "lowrank": Arm((0.001, 0.003, 0.01), prepare=to_low_rank),
    "sltrain": Arm((0.001, 0.003, 0.01), prepare=to_sltrain),
    "galore": Arm((0.003, 0.01, 0.03), build=subspace(GaLoreConfig)),
    "fira": Arm((0.003, 0.01, 0.03), build=subspace(FiraConfig)),
    "dct-adamw": Arm((0.001, 0.003, 0.01), build=subspace(DCTAdamWConfig)),
    "lisa": Arm((0.001, 0.003, 0.01), lisa=True),
}


# ------------------------------------------------------------------------------------------------------------ a run


def train(arm: Arm, setting: Setting, text: Tensor, rate: float, seed: int) -> dict[str, Any]:
    """One run: validation losses by step, sizes, seconds of the process."""
    torch.manual_seed(seed)
    model = llama(setting)
    arm.prepare(model, setting, seed)
    optimizer = arm.optimizer(model, setting, rate)
    if arm.lisa:
        options = {"num_active_layers": setting.lisa_active, "interval_steps": setting.lisa_interval, "seed": seed}
        LisaConfig(**options).build().attach(model, optimizer)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, setting.steps))
    cut = len(text) * 9 // 10
    batches = torch.Generator().manual_seed(seed)
    curve, began = {0: validate(model, setting, text[cut:])}, time.process_time()
    for step in range(1, setting.steps + 1):
        ids = windows(text[:cut], setting.batch, setting.length, batches)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % setting.every == 0 or step == setting.steps:
            curve[step] = validate(model, setting, text[cut:])
    return {
        "rate": rate,
        "seed": seed,
        # a run that diverged has no loss, and JSON has no word for that
        "validation": {str(step): value if math.isfinite(value) else None for step, value in curve.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer_state": state_of(optimizer),
        "cpu_seconds": time.process_time() - began,
    }


def llama(setting: Setting) -> nn.Module:
    config = LlamaConfig(
        hidden_size=setting.width,
        intermediate_size=setting.inner,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=setting.length,
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def schedule(step: int, steps: int) -> float:
    """Linear over the first tenth, then a cosine down to 0.1."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


@torch.no_grad()
def validate(model: nn.Module, setting: Setting, text: Tensor) -> float:
    """Mean loss in nats a byte over windows that are the same in all runs."""
    model.eval()
    generator = torch.Generator().manual_seed(1234)
    losses = []
    for _ in range(setting.validation // setting.batch):
        ids = windows(text, setting.batch, setting.length, generator)
        losses.append(model(input_ids=ids, labels=ids).loss)
    model.train()
    return torch.stack(losses).mean().item()


# --------------------------------------------------------------------------------------------------------- all runs


def measure(names: list[str], setting: Setting, text: Tensor, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{arm: its runs}, each read from its file or run now. The first seed of all arms comes first."""
    facts = {"setting": asdict(setting), "bytes": len(text)}

    def run(name: str, rate: float, seed: int) -> dict[str, Any]:
        file = folder / f"{name}-{rate:g}-{seed}.json"
        if file.exists():
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if kept.pop("of") != facts:
                raise UserError(f"{file} is of another setting or text: give another --out, or remove it.")
            return kept
        made = train(ARMS[name], setting, text, rate, seed)
        write_json(file, {**made, "of": facts})
        Console().print(f"{name} at {rate:g}, seed {seed}: {last(made):.4f} in {made['cpu_seconds']:.1f} s")
        return made

    found = {name: [run(name, rate, SEEDS[0]) for rate in ARMS[name].rates] for name in names}
    for name, runs in found.items():
        while (rate := beyond(runs)) is not None:
            runs.append(run(name, rate, SEEDS[0]))
        best = min(runs, key=last)["rate"]
        runs += [run(name, best, seed) for seed in SEEDS[1:]]
    return found


def last(run: dict[str, Any]) -> float:
    """The validation loss at the end; infinite where the run diverged."""
    value = list(run["validation"].values())[-1]
    return math.inf if value is None else value


def beyond(runs: list[dict[str, Any]]) -> float | None:
    """The next rate of the search, a third or thrice the best; None where the best lies between two others."""
    tried, best = sorted(run["rate"] for run in runs), min(runs, key=last)["rate"]
    if best not in (tried[0], tried[-1]):
        return None
    return float(f"{best * 0.3 if best == tried[0] else best * 3:.1g}")


def chosen(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the arm's rate, one a seed."""
    return [run for run in runs if run["rate"] == runs[-1]["rate"]]


def bars_of(found: dict[str, list[dict[str, Any]]]) -> list[Bar]:
    if not {"sltrain", "lowrank"} <= set(found):
        return []
    ours, theirs = ([last(run) for run in chosen(found[name])] for name in ("sltrain", "lowrank"))
    return [Bar("SLTrain: validation loss over low rank's at equal parameters", 1.0, ratio(ours, theirs))]


def table_of(found: dict[str, list[dict[str, Any]]]) -> Table:
    rows = []
    for name, runs in found.items():
        own = chosen(runs)
        losses = [last(run) for run in own]
        rows.append(
            (
                name,
                f"{own[0]['rate']:g}",
                f"{sum(losses) / len(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})",
                f"{own[0]['parameters']:,}",
                f"{own[0]['optimizer_state'] / 2**20:.2f}",
                f"{Spread.of(run['cpu_seconds'] for run in own).median:.3g}",
            )
        )
    head = ("arm", "rate", "validation loss, mean (range)", "parameters", "optimizer state, MiB", "CPU seconds")
    return Table("Pretraining from scratch at equal steps", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file, read as bytes")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="only these; repeatable")
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"), help="folder of the single runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "pretraining.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs; no results are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = QUICK if options.quick else Setting()
    text = torch.frombuffer(bytearray(options.data.read_bytes()), dtype=torch.uint8)
    found = measure(options.arm or list(ARMS), setting, text, options.out)
    bars, table = bars_of(found), table_of(found)
    for each in (bars_table(bars), table):
        each.show(Console())
    if not options.quick:
        save(options.results, {"rounds": len(SEEDS), **asdict(setting), "bytes": len(text)}, found, bars, [table])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
