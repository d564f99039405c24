"""Unlearning, worked through: a small model learns facts about people by heart and is then made to forget some of them.

    python benchmarks/unlearning.py

Every person has four facts, each asked in two ways ("where does Ada live ?", "in which town is Ada at home ?"). A Llama
of two layers learns all of them, then a LoRA unlearns those of a few people, in the first way of asking, beside a
retain set of most others. Bystanders are in neither set: they show what happens to knowledge that nobody mentions.
"retrained" is a model that never saw the people to forget, which is what unlearning aims at.

The measures are accuracy of the answer on what to forget, asked as in unlearning and in the other way, accuracy and
cross entropy on the retain set, and accuracy on the bystanders. They are taken every 8 steps, so that the second table
can say what was kept when an arm had first forgotten three quarters: the arms forget at very different speeds.
"""

from __future__ import annotations

import copy
import random
import statistics
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from paired import RESULTS, Bar, Table, bars_table, clock, ratio, save
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from loratlas import AtlasLoraConfig, LoKUConfig, PairCollator, PairedData, relative_fisher
from loratlas.commands.output import console
from loratlas.commands.quiet import quiet_libraries

PEOPLE, FORGOTTEN, BYSTANDERS = 80, 8, 16
FACTS = {  # kind: two ways of asking, number of possible answers
    "town": ("where does NAME live ?", "in which town is NAME at home ?", 12),
    "work": ("what is the work of NAME ?", "how does NAME earn money ?", 12),
    "pet": ("which animal does NAME keep ?", "what pet has NAME ?", 12),
    "dish": ("what does NAME like to eat ?", "which dish is the favourite of NAME ?", 12),
}
RANK, BATCH, EVERY = 4, 16, 8
EARLY = 2  # measures after the first at which the starts are compared
RATES = (1e-3, 3e-3)
LEFT = 0.25  # accuracy on the forget set at which it counts as forgotten; guessing gives 1/12
ARMS: dict[str, tuple[LoKUConfig, Any]] = {
    "gradient ascent": (LoKUConfig(forget_loss="ascent", retain_weight=0.0), True),
    "GradDiff": (LoKUConfig(forget_loss="ascent"), True),
    "GradDiff + FILA": (LoKUConfig(forget_loss="ascent"), "fila"),
    "IHL": (LoKUConfig(), True),
    "IHL + FILA (LoKU)": (LoKUConfig(), "fila"),
}
HEAD = ("", "forget, %", "asked otherwise, %", "retain, %", "retain loss", "bystanders, %")


@dataclass(frozen=True)
class Measures:
    """What a model knows: accuracies in [0, 1], cross entropy in nats."""

    step: int
    forget: float
    forget_asked_otherwise: float
    retain: float
    retain_loss: float
    bystanders: float


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Worlds, models and orders of the data.")] = 3,
    steps: Annotated[int, typer.Option(min=EARLY * EVERY, help="Unlearning steps.")] = 144,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "unlearning.json",
) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    runs: dict[str, list[list[Measures]]] = {}
    for seed in range(seeds):
        world = World(seed)
        known = learn(world, ("forget", "bystanders", "retain"), seed)
        runs.setdefault("known", []).append([measure(known, world, 0)])
        retrained = learn(world, ("bystanders", "retain"), seed)
        runs.setdefault("retrained", []).append([measure(retrained, world, 0)])
        for rate in RATES:
            for arm in ARMS:
                seconds, found = clock(partial(unlearn, known, world, arm, steps, rate, seed))
                runs.setdefault(f"{arm}, lr {rate:g}", []).append(found)
                typer.echo(f"seed {seed} {arm:18} lr {rate:g} {seconds:4.1f} s  {found[-1]}")
    bars, tables = bars_of(runs), [ends(runs), crossings(runs)]
    for each in (bars_table(bars), *tables):
        each.show(console())
    data = {name: [by_measure(curve) for curve in curves] for name, curves in runs.items()}
    settings = {"rounds": seeds, "steps": steps, "r": RANK, "batch": BATCH, "seed": 0}
    save(out, settings, data, bars, tables)
    console().print(f"written to {out}")


def bars_of(runs: dict[str, list[list[Measures]]]) -> list[Bar]:
    """What the paper claims of its two parts, one ratio a seed."""
    bars = []
    for rate in RATES:
        diff, hinge, loku = (runs[f"{arm}, lr {rate:g}"] for arm in ("GradDiff", "IHL", "IHL + FILA (LoKU)"))
        kept = ratio([curve[-1].retain_loss for curve in hinge], [curve[-1].retain_loss for curve in diff])
        sooner = ratio([curve[EARLY].forget for curve in loku], [curve[EARLY].forget for curve in hinge])
        bars.append(Bar(f"retain loss at the end, IHL / GradDiff, lr {rate:g}", 0.5, kept))
        claim = f"left to forget after {EARLY * EVERY} steps of IHL, FILA / LoRA's start, lr {rate:g}"
        bars.append(Bar(claim, 0.9, sooner))
    return bars


def ends(runs: dict[str, list[list[Measures]]]) -> Table:
    rows = [(name, *cells([curve[-1] for curve in curves])) for name, curves in runs.items()]
    return Table("At the end: accuracies and retain loss, mean over the seeds", HEAD, rows)


def crossings(runs: dict[str, list[list[Measures]]]) -> Table:
    rows = []
    for name, curves in runs.items():
        firsts = [next((m for m in curve if m.forget <= LEFT), None) for curve in curves]
        found = [m for m in firsts if m is not None]
        if name in ("known", "retrained") or not found:
            continue
        when = f"{statistics.mean(m.step for m in found):.0f}, {len(found)} of {len(curves)} seeds"
        rows.append((name, when, *cells(found)))
    title = f"When at most {100 * LEFT:.0f} % of the forget set is first left: mean over the seeds that got there"
    return Table(title, ("", "step", *HEAD[1:]), rows)


def by_measure(curve: list[Measures]) -> dict[str, list[float]]:
    return {field.name: [round(getattr(m, field.name), 4) for m in curve] for field in fields(Measures)}


def cells(found: list[Measures]) -> tuple[str, ...]:
    def mean(name: str) -> float:
        return statistics.mean(getattr(m, name) for m in found)

    percent = [f"{100 * mean(name):.0f}" for name in ("forget", "forget_asked_otherwise", "retain", "bystanders")]
    return (*percent[:3], f"{mean('retain_loss'):.3f}", percent[3])


class World:
    """People, their facts as token numbers, and who is to be forgotten."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        words = {word for first, second, _ in FACTS.values() for word in (first + " " + second).split()} - {"NAME"}
        answers = {kind: [f"{kind}{i}" for i in range(FACTS[kind][2])] for kind in FACTS}
        names = [f"person{i}" for i in range(PEOPLE)]
        vocabulary = ["<pad>", "<end>", *sorted(words), *names, *(a for many in answers.values() for a in many)]
        self.number = {word: i for i, word in enumerate(vocabulary)}
        facts = {name: {kind: draw.choice(answers[kind]) for kind in FACTS} for name in names}
        draw.shuffle(names)
        cuts = (FORGOTTEN, FORGOTTEN + BYSTANDERS)
        self.groups = {"forget": names[: cuts[0]], "bystanders": names[cuts[0] : cuts[1]], "retain": names[cuts[1] :]}
        self.facts = facts

    def items(self, group: str, ways: tuple[int, ...]) -> list[dict[str, list[int]]]:
        """One text a fact and way of asking; only the answer and the end have labels."""
        made = []
        for name in self.groups[group]:
            for kind, answer in self.facts[name].items():
                for way in ways:
                    question = [self.number[word] for word in FACTS[kind][way].replace("NAME", name).split()]
                    reply = [self.number[answer], self.number["<end>"]]
                    made.append({"input_ids": question + reply, "labels": [-100] * len(question) + reply})
        return made


def collate(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A padded batch."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([item[name] + [value] * (longest - len(item[name])) for item in items])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


def learn(world: World, groups: tuple[str, ...], seed: int, steps: int = 600) -> LlamaForCausalLM:
    """A model that knows every fact of `groups`, in both ways of asking."""
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(world.number), max_position_embeddings=32, pad_token_id=0, **sizes)
    )
    items = [item for group in groups for item in world.items(group, (0, 1))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    order = random.Random(seed)
    for _ in range(steps):
        model(**collate(order.sample(items, 96))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def unlearn(known: LlamaForCausalLM, world: World, arm: str, steps: int, lr: float, seed: int) -> list[Measures]:
    """The measures before, on the way and at the end."""
    objective_config, init = ARMS[arm]
    set_seed(seed)
    model: nn.Module = copy.deepcopy(known)
    forget, retain = world.items("forget", (0,)), world.items("retain", (0,))
    config = AtlasLoraConfig(r=RANK, lora_alpha=2 * RANK, init_weights=init, target_modules="all-linear")
    if init == "fila":
        batches = [DataLoader(items, BATCH, collate_fn=collate) for items in (forget, retain)]
        relative_fisher(model, config, *batches)
    model = get_peft_model(model, config)
    objective = objective_config.build(model)
    passes = -(-steps * BATCH // len(forget))
    pairs = PairedData(forget, retain if objective_config.retain_weight else None, passes, seed)
    loader = DataLoader(pairs, BATCH, shuffle=True, collate_fn=PairCollator(collate), drop_last=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    found = [measure(model, world, 0)]
    for step, batch in zip(range(1, steps + 1), loader, strict=False):
        objective.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            found.append(measure(model, world, step))
    return found


@torch.no_grad()
def measure(model: nn.Module, world: World, step: int) -> Measures:
    forget, otherwise = (quality(model, world.items("forget", (way,)))[0] for way in (0, 1))
    retain, loss = quality(model, world.items("retain", (0,)))
    return Measures(step, forget, otherwise, retain, loss, quality(model, world.items("bystanders", (0,)))[0])


def quality(model: nn.Module, items: list[dict[str, list[int]]]) -> tuple[float, float]:
    """(accuracy of the answers, cross entropy)."""
    batch = collate(items)
    outputs = model(**batch)
    answer = (batch["labels"] != -100).int().argmax(1)  # the first token with a label
    rows = torch.arange(len(items))
    right = outputs.logits[rows, answer - 1].argmax(-1) == batch["input_ids"][rows, answer]
    return float(right.float().mean()), float(outputs.loss)


if __name__ == "__main__":
    typer.run(main)
