"""SLTrain's layers beside dense and low-rank ones: parameters, optimizer state, kept activations, time of a step.

    python benchmarks/sltrain.py                       # a few seconds of one core
    python benchmarks/sltrain.py --quick --rounds 1    # does it run?

A stack of square layers with a GELU after each, trained by AdamW on a random target. Low-rank layers have the same
number of parameters as SLTrain's, at the nearest rank. Activations are what autograd saves between forward and
backward, less parameters and buffers.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from paired import RESULTS, Bar, Spread, Table, bars_table, clock, ratio, save, shuffled
from rich.console import Console
from torch import Tensor, nn

from loratlas import SLTrainLinear
from loratlas.strategies.footprint import state_of

ARMS = ("dense", "lowrank", "sltrain")


@dataclass(frozen=True)
class Setting:
    width: int = 512
    layers: int = 6
    rank: int = 96
    alpha: float = 24.0
    density: float = 0.05
    tokens: int = 1024

    def layer(self, arm: str, seed: int) -> nn.Module:
        if arm == "dense":
            return nn.Linear(self.width, self.width, bias=False)
        if arm == "lowrank":
            k = low_rank(self.width, self.width, self.rank, self.density)
            return nn.Sequential(nn.Linear(self.width, k, bias=False), nn.Linear(k, self.width, bias=False))
        return SLTrainLinear(self.width, self.width, self.rank, self.density, self.alpha, bias=False, seed=seed)


QUICK = Setting(width=32, layers=2, rank=6, tokens=16)


def low_rank(n_in: int, n_out: int, rank: int, density: float) -> int:
    """The rank at which two factors have as many numbers as SLTrain at `rank` and `density`."""
    return round(rank + density * n_in * n_out / (n_in + n_out))


class Stack:
    """One arm with its optimizer.

    Attributes:
        parameters: trained numbers. state, activations: bytes.
        seconds: one a call of `step`.
    """

    def __init__(self, arm: str, setting: Setting) -> None:
        torch.manual_seed(0)
        modules = [module for i in range(setting.layers) for module in (setting.layer(arm, i), nn.GELU())]
        self.model = nn.Sequential(*modules)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x, self.target = torch.randn(2, setting.tokens, setting.width).unbind()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.activations = self._kept()
        self._train()
        self.state = state_of(self.optimizer)
        self.seconds: list[float] = []

    def step(self) -> None:
        self.seconds.append(clock(self._train)[0])

    def _train(self) -> None:
        (self.model(self.x) - self.target).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _kept(self) -> int:
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, Tensor] = {}  # holds them, so that no address is given out twice

        def pack(tensor: Tensor) -> Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in own:
                kept[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.model(self.x)  # held until all is counted, or its memory would be given out again
        found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del y
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny layers, to see that it runs; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS / "sltrain.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = QUICK if options.quick else Setting()
    stacks = {arm: Stack(arm, setting) for arm in ARMS}
    for order in shuffled(ARMS, options.rounds):
        for arm in order:
            stacks[arm].step()
    bars, table = _bars(stacks), _table(stacks)
    for each in (bars_table(bars), table):
        each.show(Console())
    if not options.quick:
        fields = ("parameters", "state", "activations", "seconds")
        data: dict[str, Any] = {arm: {name: getattr(stack, name) for name in fields} for arm, stack in stacks.items()}
        save(options.out, {"rounds": options.rounds, **asdict(setting)}, data, bars, [table])


def _bars(stacks: dict[str, Stack]) -> list[Bar]:
    own, dense = stacks["sltrain"], stacks["dense"]
    kept = Spread.of([own.activations / dense.activations])
    return [
        Bar("SLTrain: kept activations over dense layers'", 1.1, kept),
        Bar("SLTrain: step over dense layers'", 1.5, ratio(own.seconds, dense.seconds)),
    ]


def _table(stacks: dict[str, Stack]) -> Table:
    dense, rows = stacks["dense"], []
    for arm, stack in stacks.items():
        sizes = [_share(getattr(stack, name), getattr(dense, name)) for name in ("parameters", "state", "activations")]
        time = f"{1000 * Spread.of(stack.seconds).median:.3g}"
        rows.append((arm, *sizes, time, str(ratio(stack.seconds, dense.seconds))))
    head = ("layers", "parameters", "optimizer state, bytes", "activations, bytes", "step, ms", "step (dense = 1)")
    return Table("Layers of SLTrain, low rank and full rank (in brackets: of the dense)", head, rows)


def _share(own: int, full: int) -> str:
    return f"{own:,} ({own / full:.2f})"


if __name__ == "__main__":
    main()
