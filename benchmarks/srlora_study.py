"""SRLoRA under tuned learning rates: its options beside LoRA, rsLoRA and PiSSA at equal trainable parameters.

    python benchmarks/srlora_study.py --data DIR/banking77 --rank 4 --steps 120
    python benchmarks/srlora_study.py --data DIR/cola --metric matthews --arm lora --arm gradient

The model is all-MiniLM-L6-v2 in bf16 mixed precision, with all linear layers adapted and texts of like lengths in a
batch. Every arm gets the same grid of learning rates and scales s = alpha / r, searched with one seed on rows held out
of the training rows; the pair that is best there runs with every seed on the test rows, and LoRA again under other
seeds for the noise floor. With --screen only arms that come that near to LoRA on the held-out rows go on to the test
rows. A run that is done is not done again: the folder --out keeps one file a run.

With --plain everything is in fp32 and batches are not grouped. Writes searches, finals, curves and paired intervals
against LoRA to benchmarks/results/srlora_study_<data>_r<rank>[_plain][_<tag>].json.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import loratlas_command  # noqa: F401 - keeps the libraries unloaded until `quiet_libraries` has spoken
from loratlas.commands.output import console, error_console
from loratlas.commands.quiet import quiet_libraries
from loratlas.errors import UserError
from loratlas.files import write_json

LORA_START = {"init_weights": "lora", "reservoir": "gradient", "optimizer_reset": "corrected", "fresh_warmup": 3}
GRADIENT = {**LORA_START, "select": "oldest"}
# "multiple" (r_target / r) and "gamma" here come before those of the command line; "ratio" is LoRA+'s
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rslora": ("lora", {"use_rslora": True}),
    "lora-plus": ("lora", {"ratio": 16.0}),
    "lora-plus-4": ("lora", {"ratio": 4.0}),
    "pissa": ("pissa", {}),
    "paper": ("srlora", {"schedule": "paper"}),
    "spread": ("srlora", {}),
    "zero": ("srlora", {"optimizer_reset": "zero"}),
    "corrected": ("srlora", {"optimizer_reset": "corrected"}),
    "mean-v": ("srlora", {"optimizer_reset": "mean_v"}),
    "lora-start": ("srlora", {"init_weights": "lora"}),
    "gradient-keep": ("srlora", {"init_weights": "lora", "reservoir": "gradient"}),
    "gradient-cold": ("srlora", {**LORA_START, "fresh_warmup": 0}),
    "gradient-score": ("srlora", LORA_START),
    "gradient": ("srlora", GRADIENT),
    "gradient-short": ("srlora", {**GRADIENT, "fresh_length": 0.3}),
    "gradient-shorter": ("srlora", {**GRADIENT, "fresh_length": 0.15}),
    "gradient-short-5r": ("srlora", {**GRADIENT, "fresh_length": 0.3, "multiple": 5}),
    "gradient-6r": ("srlora", {**GRADIENT, "multiple": 6}),
    "gradient-all": ("srlora", {**GRADIENT, "gamma": 1.0}),
    "gradient-all-4r": ("srlora", {**GRADIENT, "gamma": 1.0, "multiple": 4}),
    "gradient-all-5r": ("srlora", {**GRADIENT, "gamma": 1.0, "multiple": 5}),
    "gradient-all-7r": ("srlora", {**GRADIENT, "gamma": 1.0, "multiple": 7}),
    "minor": ("srlora", {**LORA_START, "reservoir": "minor"}),
}
_BASELINE, _AGAIN, _SEARCH_SEED, _TEST_ROWS = "lora", 1000, 2002, 1000
Rows = list[dict[str, Any]]


def main(
    data: Annotated[Path, typer.Option(help="Folder with train.jsonl and test.jsonl or dev.jsonl.")],
    arm: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ARMS)}; repeatable, all if none.")] = None,
    metric: str = "accuracy",
    rank: Annotated[int, typer.Option(min=1)] = 4,
    multiple: Annotated[int, typer.Option(min=1, help="r_target / r.")] = 3,
    gamma: Annotated[float, typer.Option(help="Share of the pairs that move in an event.")] = 0.5,
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates of the grid.")] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Scales alpha / r of the grid.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 120,
    max_length: int = 48,
    screen: Annotated[float | None, typer.Option(min=0, help="How far behind LoRA an arm's search may be.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="fp32 and batches in plain random order: slower.")] = False,
    tag: Annotated[str, typer.Option(help="Ends the name of the results, beside those of another study.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the finished runs.")] = Path("runs/srlora-study"),
) -> None:
    quiet_libraries()
    from loratlas.train import statistics
    from loratlas.train.search import hold_out

    names = list(dict.fromkeys([_BASELINE, *(arm or ARMS)]))
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f"there is no arm {unknown[0]!r}: choose {', '.join(ARMS)}.")
    grid = list(itertools.product(rate or [4e-3, 8e-3, 1.6e-2], scale or [1.0, 2.0]))
    tested = _load(data, metric, max_length)
    searched = hold_out(tested)
    ending = "".join(f"_{word}" for word in ("plain" if plain else "", tag) if word)
    shared = {"steps": steps, "r": rank, "multiple": multiple, "gamma": gamma, "plain": plain}
    place = out / f"{data.name}-r{rank}-x{multiple}-g{gamma:g}-{steps}{'-plain' if plain else ''}"
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        search = [_run(place, name, point, _SEARCH_SEED, searched, "search", shared) for point in grid]
        best = max(search, key=lambda row: (row["final"] if row["diverged_at"] is None else -1.0, -row["rate"]))
        point = best["rate"], best["scale"]
        found[name] = {"search": search, "rate": point[0], "scale": point[1]}
        lead = best["final"] - max(row["final"] for row in found[_BASELINE]["search"])
        wanted = list(range(seeds)) if screen is None or lead >= -screen else []
        again = [_AGAIN + seed for seed in wanted] if name == _BASELINE else []
        runs = [_run(place, name, point, seed, tested, "final", shared) for seed in [*wanted, *again]]
        found[name] |= {"lead": lead, "runs": runs}
        by_seed = {arm: {row["seed"]: row["final"] for row in each["runs"]} for arm, each in found.items()}
        first = {seed: value for seed, value in by_seed[_BASELINE].items() if seed < _AGAIN}
        floor = statistics.noise_floor(first, {s: v for s, v in by_seed[_BASELINE].items() if s >= _AGAIN}, _AGAIN)
        for other, each in ((arm, each) for arm, each in found.items() if each["runs"]):
            each["against_lora"] = _plain(statistics.paired(by_seed[other], first))
            each["steps_to_lora"] = _steps_to(each["runs"], sum(first.values()) / len(first), seeds)
        result = {**shared, "metric": metric, "grid": grid, "noise": _plain(floor), "arms": found}
        _write(f"srlora_study_{data.name}_r{rank}{ending}.json", result)
        _show(found, seeds)


def _load(data: Path, metric: str, max_length: int) -> Any:
    from loratlas.train import demo
    from loratlas.train.data import load_task
    from loratlas.train.tables import read_tables

    tables = read_tables(str(data))
    if len(tables.test) > _TEST_ROWS:
        tables = tables._replace(test=tables.test.shuffle(seed=0).select(range(_TEST_ROWS)))
    return load_task(
        tables, demo.demo_model(), name=data.name, label_column="label", metric=metric, max_length=max_length
    )


def _run(
    place: Path, name: str, point: tuple[float, float], seed: int, task: Any, phase: str, shared: dict[str, Any]
) -> dict[str, Any]:
    """One run's row, from its file if it is done."""
    from loratlas.train import demo
    from loratlas.train.run import RunSpec, run

    rate, scale = point
    file = place / f"{name}-{rate:g}-{scale:g}-{phase}-{seed}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    slug, own = ARMS[name][0], dict(ARMS[name][1])
    ratio = own.pop("ratio", None)
    r, steps = shared["r"], shared["steps"]
    # rsLoRA divides by sqrt(r): the same s all the same
    alpha = scale * (r**0.5 if own.get("use_rslora") else r)
    target = r * own.pop("multiple", shared["multiple"])
    moving = {"r_target": target, "gamma": shared["gamma"]} if slug == "srlora" else {}
    options = {"r": r, "lora_alpha": alpha, **moving, **own}
    folder = place / f"running-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    with error_console().status(f"{name}, rate {rate:g}, scale {scale:g}, {phase}, seed {seed}"):
        spec = RunSpec(slug, demo.demo_model(), str(folder), seed=seed, steps=steps, learning_rate=rate)
        spec.bf16 = spec.group_by_length = not shared["plain"]
        spec.eval_every, spec.options = max(1, steps // 6 if phase == "final" else steps), options
        if ratio is not None:
            spec.optimizer, spec.optimizer_options = "lora-plus", {"ratio": ratio}
        result = run(spec, task)
    shutil.rmtree(folder)
    curve = [[row["step"], row[task.metric]] for row in result.evals]
    row = {"rate": rate, "scale": scale, "seed": seed, "final": result.final, "curve": curve}
    row |= {"diverged_at": result.diverged_at, "options": options, "seconds": round(result.seconds, 1)}
    write_json(file, row)
    return row


def _steps_to(runs: Rows, goal: float, seeds: int) -> float | None:
    """Mean step, interpolated, at which the runs' mean curve reaches `goal`; None if it does not."""
    curves = [row["curve"] for row in runs if row["seed"] < seeds]
    points = [(0.0, 0.0), *((p[0][0], sum(x[1] for x in p) / len(p)) for p in zip(*curves, strict=True))]
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= goal:
            return round(before + (after - before) * (goal - low) / (high - low), 1)
    return None


def _write(name: str, value: dict[str, Any]) -> None:
    from paired import RESULTS, command, provenance

    write_json(RESULTS / name, {"command": command(), **provenance(), **value})


def _show(found: dict[str, dict[str, Any]], seeds: int) -> None:
    from rich.table import Table

    table = Table("arm", "rate", "scale", "mean", "against LoRA", "steps to LoRA's end")
    for name, each in found.items():
        if not each["runs"]:
            table.add_row(name, f"{each['rate']:g}", f"{each['scale']:g}", "-", f"{each['lead']:+.3f} held out", "-")
            continue
        finals = [row["final"] for row in each["runs"] if row["seed"] < seeds]
        gap = each["against_lora"]
        interval = f"{gap['mean']:+.3f}" + (f" +- {gap['half']:.3f}" if gap["half"] is not None else "")
        mean, reached = sum(finals) / len(finals), each["steps_to_lora"]
        table.add_row(name, f"{each['rate']:g}", f"{each['scale']:g}", f"{mean:.3f}", interval, str(reached or "-"))
    console().print(table)


def _plain(value: Any) -> Any:
    from dataclasses import asdict

    return None if value is None else asdict(value)


if __name__ == "__main__":
    typer.run(main)
