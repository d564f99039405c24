"""A training step of LoRA and its relatives on this engine against PEFT's LoRA: time, memory, equality.

    python benchmarks/step.py                                   # all bars, about five minutes
    python benchmarks/step.py --method svfit --arm peft --arm lora --setting d384-fp32
    python benchmarks/step.py --arm frozen --method miss         # beside PEFT's own; so for bone and randlora
    python benchmarks/step.py --quick --rounds 1                # does it run?

BERT encoders with random weights, all linear layers adapted at r = 8, 8 sequences of 128 tokens, AdamW over the
adapter. "frozen" is the floor: the encoder with a gradient to the output of its embeddings and nothing to update.
SRLoRA has all six events behind it, a history of 48 ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from arms import ARMS, BF16, FP32, PARTS, QUICK, RANK, SETTINGS, TWINS, Arm, Setting, make_arm, takes_dropout, trained
from paired import RESULTS, Bar, Spread, Table, bars_table, ratio, save, shuffled
from step_options import Out, Quick, Rounds, SettingNames, Threads
from torch import Tensor

from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries

# {cost of an SRLoRA arm over our LoRA}; measured where the history is cheap to beat, at d = 768
SRLORA_COSTS = {"srlora": 1.10, "srlora-inplace": 1.03}
# {cost of a step in which ranks grow over our LoRA of the largest rank}
GROWTH_COSTS = {"increlora": 1.15, "triadaptlora": 1.15}


def main(
    rounds: Rounds = 6,
    threads: Threads = 1,
    arm: Annotated[list[str] | None, typer.Option(help=f"Only these of {', '.join(ARMS)}; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method of the catalogue as a further arm.")] = None,
    setting: SettingNames = None,
    quick: Quick = False,
    out: Out = RESULTS / "step.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    bars: list[Bar] = []
    tables: list[Table] = []
    data: list[dict[str, Any]] = []
    equal: dict[str, dict[str, float]] = {}
    for each in _chosen(QUICK if quick else SETTINGS, setting):
        joining = [own for own in method or () if not each.dropout or takes_dropout(own)]
        further = [name for own in joining for name in (TWINS.get(own), own) if name]
        names = [name for name in each.arms() if not arm or name in arm] + further
        if not names:
            continue
        arms = measure(each, names, rounds)
        if {"peft", "lora"} <= set(names) and not each.dropout:
            equal[each.name] = equality(each)
        bars += bars_of(each, arms)
        tables.append(table_of(each, arms))
        tables[-1].show(console())
        data.append(data_of(each, arms, equal.get(each.name)))
    if equal:
        tables.append(equality_table(equal))
        tables[-1].show(console())
    bars_table(bars).show(console())
    save(out, {"rounds": rounds, "r": RANK, "quick": quick, "seed": 0}, data, bars, tables)
    console().print(f"written to {out}")


def _chosen(settings: list[Setting], names: list[str] | None) -> list[Setting]:
    known = [each.name for each in settings]
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"there is no setting {name!r}; settings: {', '.join(known)}")
    return [each for each in settings if not names or each.name in names]


# ------------------------------------------------------------------------------------------------------- measuring


def measure(setting: Setting, names: list[str], rounds: int) -> dict[str, Arm]:
    arms = {name: make_arm(name, setting) for name in names}
    take_turns(arms, rounds)
    return arms


def take_turns(arms: Mapping[str, Arm], rounds: int) -> None:
    """Interleaved rounds, in which every arm takes two steps and the second is timed.

    The first brings its own state of heap and caches about: in training a step follows one of its kind. Without it,
    each arm would pay for what another one left; PEFT's step took 1.1 times as long so.
    """
    for arm in arms.values():
        arm.saved_bytes = saved_bytes(arm)
    for order in shuffled(list(arms), rounds):
        for name in order:
            arms[name].step()
            for part, seconds in arms[name].step().items():
                arms[name].seconds[part].append(seconds)


def saved_bytes(arm: Arm) -> int:
    """Bytes that autograd keeps between forward and backward, every storage once, the model's own tensors apart."""
    own = {t.untyped_storage().data_ptr() for t in (*arm.model.parameters(), *arm.model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def equality(setting: Setting) -> dict[str, float]:
    """PEFT's LoRA and ours with equal factors, none of them zero: how far apart losses and gradients are.

    Gradients are compared by their relative distance, over all of them together. In bf16 both are also compared with
    the same bf16 weights computed in fp32: the distance from the truth says more than that of two roundings.
    """
    loss, grads = _with_random_factors("lora", setting)
    their_loss, their_grads = _with_random_factors("peft", setting)
    result = {"loss": abs(loss - their_loss) / abs(their_loss), "gradients": _distance(grads, their_grads)}
    if setting.dtype != FP32:
        _, true = _with_random_factors("peft", setting, in_fp32=True)
        result["lora_to_fp32"], result["peft_to_fp32"] = _distance(grads, true), _distance(their_grads, true)
    return result


def _with_random_factors(name: str, setting: Setting, *, in_fp32: bool = False) -> tuple[float, list[Tensor]]:
    arm = make_arm(name, setting)
    if in_fp32:
        arm.model.float()
    factors, generator = trained(arm.model), torch.Generator().manual_seed(2)
    for p in factors:
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    loss = arm.loss()
    return float(loss.detach()), [grad.double() for grad in torch.autograd.grad(loss, factors)]


def _distance(found: list[Tensor], true: list[Tensor]) -> float:
    gap = sum(float((a - b).square().sum()) for a, b in zip(found, true, strict=True))
    return (gap / sum(float(b.square().sum()) for b in true)) ** 0.5


# ------------------------------------------------------------------------------------------------------- reporting


def bars_of(setting: Setting, arms: dict[str, Arm]) -> list[Bar]:
    """The claims that these arms can decide."""
    bars = []
    times = {name: arm.seconds["step"] for name, arm in arms.items()}
    if {"peft", "lora"} <= set(arms):
        limit = 1.3 if setting.dropout else 1.08 if setting.dtype == FP32 else 1.2
        faster = ratio(times["peft"], times["lora"])
        bars.append(Bar(f"{setting.name}: step, PEFT LoRA / ours", limit, faster, at_least=True))
        if setting.dtype == BF16:
            share = arms["lora"].saved_bytes / arms["peft"].saved_bytes
            bars.append(Bar(f"{setting.name}: saved activations, ours / PEFT LoRA", 0.6, Spread.of([share])))
    for ours, theirs in TWINS.items():
        if {ours, theirs} <= set(arms):
            faster = ratio(times[theirs], times[ours])
            share = Spread.of([arms[ours].saved_bytes / arms[theirs].saved_bytes])
            bars.append(Bar(f"{setting.name}: step, {theirs} / {ours}", 1.15, faster, at_least=True))
            bars.append(Bar(f"{setting.name}: saved activations, {ours} / {theirs}", 0.8, share))
    for name, limit in GROWTH_COSTS.items():
        if {name, "lora"} <= set(arms):
            cost = ratio(times[name], times["lora"])
            bars.append(Bar(f"{setting.name}: step in growth, {name} / our LoRA of r_max", limit, cost))
    for name, limit in SRLORA_COSTS.items():
        if not {name, "lora"} <= set(arms):
            continue
        if setting.width == 768:
            cost = ratio(times[name], times["lora"])
            bars.append(Bar(f"{setting.name}: step, {name} / our LoRA", limit, cost))
        step = statistics.median(times[name])
        events = Spread.of(seconds / step for seconds in arms[name].event_seconds)
        bars.append(Bar(f"{setting.name}: recomposition of {name} / its step", 1.0, events))
    return bars


def table_of(setting: Setting, arms: dict[str, Arm]) -> Table:
    """Milliseconds of every part, each against PEFT's LoRA (or the first arm), and the memory."""
    base = "peft" if "peft" in arms else next(iter(arms))
    rows = []
    for name, arm in arms.items():
        cells = [f"{1e3 * statistics.median(arm.seconds[part]):.0f}" for part in PARTS]
        cells += [str(ratio(arms[base].seconds[part], arm.seconds[part])) for part in PARTS]
        rows.append((name, *cells, f"{arm.saved_bytes / 2**20:.1f}"))
    head = ("arm", "step ms", "forward", "backward", *(f"{part} {base}/arm" for part in PARTS), "saved MiB")
    return Table(setting.name, head, rows)


def equality_table(found: dict[str, dict[str, float]]) -> Table:
    columns = ("loss", "gradients", "lora_to_fp32", "peft_to_fp32")
    rows = [
        (name, *(f"{values[column]:.1e}" if column in values else "–" for column in columns))
        for name, values in found.items()
    ]
    head = ("setting", "loss", "gradients", "gradients, ours to fp32", "gradients, PEFT's to fp32")
    return Table("Our LoRA and PEFT's with equal factors: relative distance", head, rows)


def data_of(setting: Setting, arms: dict[str, Arm], equal: dict[str, float] | None) -> dict[str, Any]:
    """Everything of one setting; "over" holds the arm's time over that of every other one."""
    rows: dict[str, Any] = {}
    for name, arm in arms.items():
        rows[name] = {"saved_bytes": arm.saved_bytes, "event_seconds": arm.event_seconds}
        for part in PARTS:
            over = {other: asdict(ratio(arm.seconds[part], arms[other].seconds[part])) for other in arms}
            rows[name][part] = {"seconds": asdict(Spread.of(arm.seconds[part])), "over": over}
    about = {**asdict(setting), "dtype": str(setting.dtype).removeprefix("torch.")}
    return {**about, "arms": rows, "lora_against_peft": equal}


if __name__ == "__main__":
    typer.run(main)
