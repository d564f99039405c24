"""Runs PEFT's own custom-model and decoder batteries against our adapters: `python tests/conformance/run.py [slug
...]`.

The tests come from the source distribution of the installed PEFT, which `pip download` fetches once into .cache/. Exit
status 1 if anything failed or nothing was collected.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
KINDS = ["linear", "conv1d", "embedding", "conv2d"]
# PEFT wants a start at the base model's function; methods that have another get the options that come closest to that
CASES = {
    "lora": {"config": "loratlas:AtlasLoraConfig", "kinds": KINDS, "kwargs": {"r": 4}},
    "block-lora": {"config": "loratlas:BlockLoraConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4}},
    "bone": {"config": "loratlas:BoneConfig", "kinds": ["linear"], "kwargs": {"r": 2}},
    "miss": {"config": "loratlas:AtlasMissConfig", "kinds": KINDS[:2], "kwargs": {"r": 4}},
    # PEFT's Conv1D puts out numbers of about 0.01: what acts on them moves too little in three steps without a scale
    "hydra": {"config": "loratlas:HydraConfig", "kinds": KINDS[:2], "kwargs": {"r": 4, "scaling": 4.0}},
    "salt": {"config": "loratlas:SaltConfig", "kinds": ["linear", "conv1d", "conv2d"], "kwargs": {"r": 4}},
    "soka": {"config": "loratlas:SoKAConfig", "kinds": ["linear", "conv1d"], "kwargs": {"r": 4}},
    "lora-ga": {"config": "loratlas:LoraGAConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4, "lora_alpha": 1}},
    "svfit": {"config": "loratlas:SVFitConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {}},
    "loldu": {"config": "loratlas:LoLDUConfig", "kinds": KINDS[:2], "kwargs": {"r": 4}},
    "allora": {"config": "loratlas:ALLoraConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4}},
    "dylora": {"config": "loratlas:DyLoraConfig", "kinds": KINDS, "kwargs": {"r": 4, "frozen": False}},
    # two that start with factors so small that three steps hardly move them in PEFT's Conv1D without a scale
    "increlora": {
        "config": "loratlas:IncreLoraConfig",
        "kinds": KINDS[:2] + KINDS[3:],
        "kwargs": {"r": 4, "init_r": 4, "alpha_pattern": {"conv1d": 4096}},
    },
    "triadaptlora": {
        "config": "loratlas:TriAdaptLoraConfig",
        "kinds": KINDS[:2] + KINDS[3:],
        "kwargs": {"r": 4, "init_r": 4, "alpha_pattern": {"conv1d": 128}, "init_variant": "eye"},
    },
    "lamda": {"config": "loratlas:LamdaConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4}},
    "lora-sb": {
        "config": "loratlas:LoraSBConfig",
        "kinds": KINDS[:2] + KINDS[3:],
        "kwargs": {"r": 4, "init_lr": 1e-9},
    },
    "lora-xs": {"config": "loratlas:LoraXSConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4, "init_std": 0.0}},
    "nlora": {
        "config": "loratlas:NLoraConfig",
        "kinds": KINDS[:2] + KINDS[3:],
        "kwargs": {"r": 4, "init_weights": "slora"},
    },
    "wara": {"config": "loratlas:WaRAConfig", "kinds": ["linear"], "kwargs": {"r": 4}},
    "nola": {
        "config": "loratlas:NolaConfig",
        "kinds": KINDS[:2] + KINDS[3:],
        "kwargs": {"r": 4, "num_basis": 16},
    },
    "randlora": {"config": "loratlas:RandLoraConfig", "kinds": KINDS[:2], "kwargs": {"r": 4}},
    "codyra": {
        "config": "loratlas:CoDyRAConfig",
        "kinds": KINDS[:2] + KINDS[3:],
        "kwargs": {"r": 4, "lora_alpha": 1},
    },
    "diffora": {"config": "loratlas:DiffoRAConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4}},
    "sora": {"config": "loratlas:SoRAConfig", "kinds": KINDS[:2] + KINDS[3:], "kwargs": {"r": 4, "lora_alpha": 1}},
    "sltrain": {"config": "loratlas:SLTrainConfig", "kinds": KINDS[:2], "kwargs": {"r": 4}},
    "tlora": {"config": "loratlas:TLoraConfig", "kinds": KINDS[:2], "kwargs": {"r": 1, "num_factors": 2}},
    "srlora": {"config": "loratlas:SRLoraConfig", "kinds": KINDS, "kwargs": {"r": 4}},
}
# plain factors, pairs that move, a diagonal core, a square core, no low-rank form
ONE_OF_EACH_KIND = ["lora", "srlora", "svfit", "nlora", "soka"]
SUITES = {"custom": "tests/test_custom_models.py", "decoder": "tests/test_decoder_models.py"}
CONFTEST = """\
def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)
"""


def sources() -> Path:
    """Folder of PEFT's unpacked source distribution, fetched on first use and put in place atomically."""
    place = CACHE / f"peft-{peft.__version__}"
    if place.is_dir():
        return place
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft", "-d", folder]
        done = subprocess.run([*command, f"peft=={peft.__version__}"], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip()[-300:]
            raise SystemExit(f"the tests of peft {peft.__version__} could not be downloaded: {reason}")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        unpacked = Path(folder) / place.name
        (unpacked / "tests" / "__init__.py").touch()
        (unpacked / "tests" / "conftest.py").write_text(CONFTEST, encoding="utf-8")
        shutil.move(str(unpacked), place)
    return place


def decoders() -> list[str]:
    """Tiny random decoder models whose names contain what PEFT's skip rules look for."""
    import torch
    import transformers as tf

    tf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    opt = tf.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **small)
    gpt2 = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    llama = tf.LlamaConfig(intermediate_size=32, **small)
    paths = []
    for model in (tf.OPTForCausalLM(opt), tf.GPT2LMHeadModel(gpt2), tf.LlamaForCausalLM(llama)):
        path = CACHE / "models" / f"tiny-random-{type(model).__name__}"
        model.save_pretrained(path)
        paths.append(str(path))
    return paths


def run(slug: str, suite: str, models: list[str]) -> tuple[Counter[str], list[str], float]:
    """(counts by outcome, failed node ids, seconds) of one battery."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        case = {**CASES[slug], "suite": suite, "models": models, "report": str(report)}
        env = {
            **os.environ,
            "LORATLAS_CONFORMANCE": json.dumps(case),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        flags = ["-q", "-p", "plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore", "--tb=line"]
        command = [sys.executable, "-m", "pytest", *flags, SUITES[suite]]
        done = subprocess.run(command, cwd=sources(), env=env, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"PEFT's tests did not start:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        outcomes = json.loads(report.read_text(encoding="utf-8"))
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    return Counter(outcomes.values()), failed, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slugs", nargs="*", default=list(CASES))
    parser.add_argument("--one-of-each-kind", action="store_true", help=f"only {', '.join(ONE_OF_EACH_KIND)}")
    arguments = parser.parse_args()
    slugs = ONE_OF_EACH_KIND if arguments.one_of_each_kind else arguments.slugs
    title = f"PEFT {peft.__version__}'s own tests"
    table = Table("method", "suite", "passed", "failed", "skipped", "seconds", title=title)
    failures: list[str] = []
    sources()
    models = decoders()
    batteries = [(slug, suite) for slug in slugs for suite in SUITES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each runs in a process of one thread
        results = pool.map(lambda battery: run(*battery, models), batteries)
        for (slug, suite), (counts, failed, seconds) in zip(batteries, results, strict=True):
            failures += failed or ([] if counts["passed"] else [f"{slug} {suite}: nothing was collected"])
            numbers = [str(counts[outcome]) for outcome in ("passed", "failed", "skipped")]
            table.add_row(slug, suite, *numbers, f"{seconds:.0f}")
    Console().print(table)
    if failures:
        raise SystemExit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
