"""A step of the subspace optimizers against galore-torch and AdamW: time, its share of refreshing, state.

    python benchmarks/optim.py                              # all arms, about a minute of CPU time
    python benchmarks/optim.py --arm galore --arm dct-adamw --rounds 3
    python benchmarks/optim.py --quick --rounds 1           # does it run?

A GPT-2 of 6 layers and width 768 with random weights, full fine-tuning, its 24 inner matrices projected at r = 128.
Timed is `optimizer.step()` alone, in seconds of the process's CPU time, which other work on the machine touches little:
forward and backward are the same for all arms, which get the gradients of one backward pass a round. In a round every
arm takes two steps with its subspace as it is, of which the second is timed, and a third that refreshes it. What is
reported as a step has the refresh in it as often as its gap says.

The arm galore-torch is left out where the package (with bitsandbytes, which it imports) is not installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from paired import RESULTS, Bar, Spread, Table, bars_table, ratio, save, shuffled
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel

from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries
from loratlas.engine.parts import OptimizerConfig
from loratlas.errors import UserError
from loratlas.optim.dct_adamw import DCTAdamWConfig
from loratlas.optim.fira import FiraConfig
from loratlas.optim.galore import GaLoreConfig
from loratlas.optim.groups import parameter_groups

NEVER = 10**9
GAP = 200


@dataclass(frozen=True)
class Setting:
    width: int = 768
    layers: int = 6
    rank: int = 128
    vocabulary: int = 1000
    batch: int = 4
    length: int = 128

    def model(self) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=self.width,
            n_layer=self.layers,
            n_head=12,
            n_positions=self.length,
            vocab_size=self.vocabulary,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).train()


@dataclass
class Arm:
    """One optimizer over parameters of its own.

    Attributes:
        feed: puts gradients at the parameters, given a model that has just done its backward pass.
        set_gap: changes the steps between two subspaces; None for optimizers that have none.
        gap: how often it refreshes when it is used.
        plain, refreshed: seconds of a step without and with a refresh, one a round.
    """

    optimizer: Optimizer
    feed: Callable[[nn.Module], None]
    set_gap: Callable[[int], None] | None = None
    gap: int = NEVER
    plain: list[float] = field(default_factory=list)
    refreshed: list[float] = field(default_factory=list)

    def measure(self) -> None:
        if not self.plain:
            self.optimizer.step()  # makes the state, which galore-torch's projectors are part of
        if self.set_gap:
            self.set_gap(NEVER)
        self.optimizer.step()
        self.plain.append(self._timed_step())
        if self.set_gap:
            self.set_gap(1)
            self.refreshed.append(self._timed_step())

    def _timed_step(self) -> float:
        begin = time.process_time()
        self.optimizer.step()
        return time.process_time() - begin

    @property
    def refresh(self) -> list[float]:
        """Seconds that a refresh adds to a step."""
        return [with_it - without for with_it, without in zip(self.refreshed, self.plain, strict=True)]

    @property
    def step(self) -> list[float]:
        """Seconds of a step with its share of the refreshes."""
        if not self.set_gap:
            return self.plain
        return [plain + refresh / self.gap for plain, refresh in zip(self.plain, self.refresh, strict=True)]

    def state_bytes(self) -> int:
        """Of all tensors in the state but step counters, also those inside of objects."""
        found = 0
        for state in self.optimizer.state.values():
            values = [value for name, value in state.items() if name != "step"]
            values += [inner for value in values if hasattr(value, "__dict__") for inner in vars(value).values()]
            found += sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))
        return found


# ------------------------------------------------------------------------------------------------------------- arms


def full_weights(setting: Setting, make: Callable[[nn.Module], Optimizer]) -> tuple[Optimizer, Callable[..., None]]:
    """The optimizer over a copy of the model, and what gives it another model's gradients."""
    model = setting.model()

    def feed(source: nn.Module) -> None:
        for own, other in zip(model.parameters(), source.parameters(), strict=True):
            own.grad = other.grad

    return make(model), feed


def subspace(config: Callable[[int], OptimizerConfig], gap: int = GAP) -> Callable[[Setting], Arm]:
    def arm(setting: Setting) -> Arm:
        optimizer, feed = full_weights(setting, lambda model: config(setting.rank).build(model, lr=1e-4))

        def set_gap(steps: int) -> None:
            for group in optimizer.param_groups:
                group["update_proj_gap"] = steps

        return Arm(optimizer, feed, set_gap, gap)

    return arm


def adamw(setting: Setting) -> Arm:
    return Arm(*full_weights(setting, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4)))


def galore_torch(setting: Setting) -> Arm:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise UserError(f"galore-torch is left out: {error}") from None

    def make(model: nn.Module) -> Optimizer:
        projected = {"rank": setting.rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
        groups = parameter_groups(model, projected)
        for group in groups:
            group["params"] = [p for _, p in group["params"]]
        return GaLoreAdamW(groups, lr=1e-4, no_deprecation_warning=True)

    optimizer, feed = full_weights(setting, make)

    def set_gap(steps: int) -> None:
        for state in optimizer.state.values():
            if "projector" in state:
                state["projector"].update_proj_gap = steps

    return Arm(optimizer, feed, set_gap, GAP)


# an arm of an adapter's optimizer or of a strategy makes its own model, and its `feed` runs that model's backward pass
ARMS: dict[str, Callable[[Setting], Arm]] = {
    "adamw": adamw,
    "galore-torch": galore_torch,
    "galore": subspace(lambda r: GaLoreConfig(r=r)),
    "galore-8bit": subspace(lambda r: GaLoreConfig(r=r, optimizer="adamw8bit")),
    "fira": subspace(lambda r: FiraConfig(r=r, alpha=0.25)),
    "dct-adamw": subspace(lambda r: DCTAdamWConfig(r=r), gap=1),
    "dct-adamw-int8": subspace(lambda r: DCTAdamWConfig(r=r, error_feedback="int8"), gap=1),
}


# -------------------------------------------------------------------------------------------------------- measuring


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    arm: Annotated[list[str] | None, typer.Option(help=f"Only these of {', '.join(ARMS)}; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, to see that it runs.")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "optim.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    setting = Setting(width=48, layers=1, rank=8, batch=2, length=8) if quick else Setting()
    arms = measure(setting, arm or ARMS, rounds)
    bars, tables = bars_of(arms), [table_of(arms)]
    for table in [*tables, bars_table(bars)]:
        table.show(console())
    save(out, {"rounds": rounds, **asdict(setting), "quick": quick}, data_of(arms), bars, tables)
    console().print(f"written to {out}")


def measure(setting: Setting, names: Iterable[str], rounds: int) -> dict[str, Arm]:
    arms = {}
    for name in names:
        if name not in ARMS:
            raise typer.BadParameter(f"there is no arm {name!r}; arms: {', '.join(ARMS)}")
        try:
            arms[name] = ARMS[name](setting)
        except UserError as error:
            console().print(str(error))
    source = setting.model()
    generator = torch.Generator().manual_seed(1)
    for order in shuffled(list(arms), rounds):
        ids = torch.randint(0, setting.vocabulary, (setting.batch, setting.length), generator=generator)
        source.zero_grad()
        source(input_ids=ids, labels=ids).loss.backward()
        for name in order:
            arms[name].feed(source)
            arms[name].measure()
    return arms


# -------------------------------------------------------------------------------------------------------- reporting


def bars_of(arms: dict[str, Arm]) -> list[Bar]:
    """The claims that these arms can decide."""
    bars = []
    if {"galore", "galore-torch"} <= set(arms):
        ours, theirs = arms["galore"], arms["galore-torch"]
        bars.append(
            Bar(f"step with refresh every {GAP}, our GaLore / galore-torch", 0.9, ratio(ours.step, theirs.step))
        )
        share = Spread.of([ours.state_bytes() / theirs.state_bytes()])
        bars.append(Bar("state bytes, our GaLore / galore-torch", 1.0, share))
    for name in ("galore", "galore-torch"):
        if {name, "dct-adamw"} <= set(arms):
            cost = ratio(arms["dct-adamw"].refresh, arms[name].refresh)
            bars.append(Bar(f"refresh, DCT-AdamW / SVD of {name}", 0.1, cost))
    return bars


def table_of(arms: dict[str, Arm]) -> Table:
    """Milliseconds, and the state in MiB and against AdamW's."""
    base = arms.get("adamw")
    rows = []
    for name, arm in arms.items():
        refresh = f"{1e3 * statistics.median(arm.refresh):.0f}" if arm.set_gap else "–"
        size = arm.state_bytes()
        rows.append(
            (
                name,
                f"{1e3 * statistics.median(arm.plain):.0f}",
                refresh,
                str(arm.gap) if arm.set_gap else "–",
                f"{1e3 * statistics.median(arm.step):.0f}",
                str(ratio(arm.step, base.step)) if base else "–",
                f"{size / 2**20:.0f}",
                f"{size / base.state_bytes():.2f}" if base else "–",
            )
        )
    head = ("arm", "step ms", "refresh ms", "every", "with refresh", "/ adamw", "state MiB", "state / adamw")
    return Table("optimizer.step() of a 6-layer GPT-2, d = 768", head, rows)


def data_of(arms: dict[str, Arm]) -> dict[str, Any]:
    return {
        name: {
            "gap": arm.gap if arm.set_gap else None,
            "plain_seconds": arm.plain,
            "refreshed_seconds": arm.refreshed,
            "state_bytes": arm.state_bytes(),
        }
        for name, arm in arms.items()
    }


if __name__ == "__main__":
    typer.run(main)
