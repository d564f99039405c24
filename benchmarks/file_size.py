"""What is written to disk for one adapter of every method, and what trains of it.

    python benchmarks/file_size.py
    python benchmarks/file_size.py --method nola --method lora --rank 1

The model is all-MiniLM-L6-v2 without a head, all 36 linear layers adapted. Methods with a rank have r = 8, all else is
at its default; starts that follow data see one batch of random tokens. The size is that of
adapter_model.safetensors as the untrained adapter saves it: methods whose ranks move write others later.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from paired import RESULTS, Bar, Spread, Table, bars_table, save
from peft import get_peft_model
from rich.console import Console
from transformers import AutoModel

from loratlas import calibrate
from loratlas.catalog import baselines, load_entry, systems
from loratlas.engine.calibrate import needs
from loratlas.errors import UserError
from loratlas.train import demo
from loratlas.train.methods import build_config, trainable

METHODS = [s.slug for s in (*baselines(), *systems()) if s.kind == "adapter" and (s.entry or "").startswith("loratlas")]


def measure(slug: str, rank: int) -> dict[str, int]:
    """{"file": bytes, "trained": numbers}."""
    torch.manual_seed(0)
    model, system = AutoModel.from_pretrained(demo.demo_model()), trainable(slug)
    options = {"r": rank} if "r" in {field.name for field in fields(load_entry(system))} else {}
    config = build_config(system, "", model, options)
    if needs(config):
        ids = torch.randint(0, model.config.vocab_size, (8, 16))
        calibrate(model, config, lambda: model(input_ids=ids).last_hidden_state.square().mean(), 1)
    adapted: Any = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return {"file": size, "trained": sum(p.numel() for p in adapted.parameters() if p.requires_grad)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=METHODS, help="only these; repeatable")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "file_size.json")
    options = parser.parse_args()
    found = {}
    for slug in options.method or METHODS:
        try:
            found[slug] = measure(slug, options.rank)
        except UserError as error:
            Console(stderr=True).print(f"{slug} is left out: {error}", markup=False)
    rows = [
        (slug, f"{each['file'] / 1e3:,.0f}", f"{each['trained']:,}")
        for slug, each in sorted(found.items(), key=lambda item: item[1]["file"])
    ]
    table = Table(f"One adapter of MiniLM, r = {options.rank}", ("method", "file, kB", "trained numbers"), rows)
    bars = []
    if {"nola", "lora"} <= set(found):
        share = found["nola"]["file"] / found["lora"]["file"]
        bars = [Bar("NOLA's adapter file over LoRA's", 0.1, Spread.of([share]))]
    for each in (bars_table(bars), table):
        each.show(Console())
    save(options.out, {"rounds": 1, "rank": options.rank}, found, bars, [table])


if __name__ == "__main__":
    main()
