"""What a data-driven start costs: LoRA-GA on the demo's model and texts, ours against PEFT's.

    python benchmarks/calibrate.py --rounds 7 --out benchmarks/results/calibrate.json

Both sides see the same batches in training mode and start the same layers at the same rank: `calibrate` and
`preprocess_loraga` (the pass), then `get_peft_model` (the start). Every round runs both sides, one after the other, in
alternating order; reported are ratios within a round (median, minimum to maximum). One untimed round warms up. Times
are CPU seconds of the process, which others on the machine disturb less than wall-clock time.

Memory is counted, not sampled: the peak of the bytes of all tensors that come into being during the pass, minus that of
one plain LoRA step on the same batch. What then lies in the result of the pass is host memory; on a GPU the rest is
what the device needs. `gradients` is the most that `.grad` of all weights held between two layers' backwards.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from peft import LoraGAConfig as PeftsLoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from loratlas import AtlasLoraConfig, LoraGAConfig, calibrate
from loratlas.commands.quiet import quiet_libraries
from loratlas.files import write_json

Batches = list[dict[str, Tensor]]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that come into being while it is active; those of `model` are known before."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        super().__init__()
        self._seen: Any = WeakIdKeyDictionary()
        self.now = self.peak = 0
        for tensor in [*model.parameters(), *model.buffers(), *tree_leaves(batches)]:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            storage = value.untyped_storage() if isinstance(value, Tensor) else None
            if storage is not None and storage not in self._seen:
                self._seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def ours(model: nn.Module, batches: Batches) -> tuple[Any, Callable[[], Any]]:
    config = LoraGAConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    return config, lambda: calibrate(model, config, batches)


def pefts(model: nn.Module, batches: Batches) -> tuple[Any, Callable[[], Any]]:
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        init_lora_weights="lora_ga",
        lora_ga_config=PeftsLoraGAConfig(),
    )
    config = _maybe_include_all_linear_layers(config, model)  # preprocess_loraga does not know "all-linear"

    def step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    return config, lambda: preprocess_loraga(model, config, step)


SIDES = {"loratlas": ours, "peft": pefts}


def timed(base: nn.Module, side: str, batches: Batches) -> tuple[float, float]:
    """CPU seconds of the pass and of `get_peft_model`."""
    model = copy.deepcopy(base)
    config, look = SIDES[side](model, batches)
    began = time.process_time()
    look()
    middle = time.process_time()
    get_peft_model(model, config)
    return middle - began, time.process_time() - middle


def counted(base: nn.Module, side: str, batches: Batches) -> dict[str, int]:
    """Peak bytes of the pass, and the most that weights' gradients held."""
    model = copy.deepcopy(base)
    _, look = SIDES[side](model, batches)
    gradients = 0

    def watch(*_: Any) -> None:
        nonlocal gradients
        held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        gradients = max(gradients, held)

    live = LiveBytes(model, batches)
    handles = [m.register_full_backward_hook(watch) for m in model.modules() if isinstance(m, nn.Linear)]
    handles.append(model.register_forward_pre_hook(watch))
    with live:
        look()
    for handle in handles:
        handle.remove()
    return {"peak": live.peak, "gradients": gradients}


def lora_step(base: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Peak bytes of one forward and backward under plain LoRA, and the bytes of its adapters."""
    config = AtlasLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(copy.deepcopy(base), config)
    live = LiveBytes(model, [batch])
    with live:
        model(**batch).loss.backward()
    return live.peak, sum(p.nbytes for name, p in model.named_parameters() if "ATLAS_" in name)


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("benchmarks/results/calibrate.json"),
    rounds: int = 7,
    steps: int = 8,
    batch_size: int = 32,
    threads: int = 1,
) -> None:
    quiet_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    from loratlas.train.models import load_model
    from loratlas.train.work import Work

    work = Work()
    task = work.load()
    base = load_model(work.base, task).train()
    rows = [[task.train[batch_size * i + k] for k in range(batch_size)] for i in range(steps)]
    batches = [dict(task.collator(each)) for each in rows]

    step_peak, adapters = lora_step(base, batches[0])
    config, look = ours(copy.deepcopy(base), batches[:1])
    found = look()
    sizes = [value.nbytes for named in found.values() for value in named.values()]
    memory: dict[str, Any] = {"lora_step": step_peak, "adapters": adapters, "largest_gradient": max(sizes)}
    memory["statistics"] = sum(sizes)
    del config, found
    for side in SIDES:
        memory[side] = counted(base, side, batches[:2])
    memory["device_extra"] = memory["loratlas"]["peak"] - step_peak - sum(sizes)

    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in list(SIDES) if number % 2 else reversed(list(SIDES)):
            both = timed(base, side, batches)
            if number:
                seconds[side].append(both)
    pairs = list(zip(seconds["loratlas"], seconds["peft"], strict=True))
    ratios = {
        "pass": spread([a[0] / b[0] for a, b in pairs]),
        "start": spread([a[1] / b[1] for a, b in pairs]),
        "setup": spread([sum(a) / sum(b) for a, b in pairs]),
    }
    settings = {"model": "all-MiniLM-L6-v2", "r": 8, "rounds": rounds, "steps": steps, "batch_size": batch_size}
    columns = {side: [list(part) for part in zip(*both, strict=True)] for side, both in seconds.items()}
    result = {
        "torch": torch.__version__,
        "settings": {**settings, "threads": threads},
        "seconds": {side: {"pass": looks, "start": starts} for side, (looks, starts) in columns.items()},
        "ratio_to_peft": ratios,
        "bytes": memory,
    }
    write_json(out, result)
    for name, values in ratios.items():
        typer.echo(f"{name:6} {values['median']:.2f} of PEFT's time ({values['min']:.2f} to {values['max']:.2f})")
    mib = {name: value / 2**20 for name, value in memory.items() if isinstance(value, int)}
    typer.echo(
        f"memory beside a LoRA step and the {mib['statistics']:.1f} MiB of statistics: {mib['device_extra']:.2f} MiB; "
        f"one gradient {mib['largest_gradient']:.2f}, adapters {mib['adapters']:.2f}; gradients held between layers: "
        f"{memory['loratlas']['gradients'] / 2**20:.2f} (PEFT {memory['peft']['gradients'] / 2**20:.2f}) MiB"
    )


if __name__ == "__main__":
    typer.run(main)
