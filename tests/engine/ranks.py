"""Run by `test_distributed.py` on two ranks: trains SRLoRA in every setup and writes what came out into a folder."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from spread import held
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from toys import Toy, adamw, adapted, config, inputs, trainable, views

from loratlas import UserError, attach
from loratlas.adapters import srlora
from loratlas.engine.distributed import same_start, whole_state_dict
from loratlas.engine.sharded import local, whole

STEPS, STOP = 8, 5
RESETS = ("keep", "zero", "corrected", "mean_v")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, **options: Any) -> Any:
    """FSDP2 as it is meant: every block, then the rest."""
    for name in ("first", "second"):
        fully_shard(model.get_submodule(f"base_model.model.{name}"), **options)
    return fully_shard(model, **options)


class Rank:
    """One rank's side: both ranks run every method, and the files that they write carry their number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, dist.get_rank()
        self.x = inputs(seed=self.number)  # every rank has other data
        self.said: dict[str, str] = {}

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor | None = None) -> None:
        for _ in range(steps):
            (model(self.x if x is None else x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def write(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **found: Any) -> None:
        """Everything that was decided or learned."""
        found |= held(model)
        for number, t in enumerate(views(model)):
            for key in t.layer.method.params if optimizer is not None else ():
                for moment, value in optimizer.state[getattr(t, key)].items():
                    found[f"{number}.{key}.{moment}"] = whole(value)
        tensors = {key: value.contiguous().clone() for key, value in found.items()}
        save_file(tensors, self.folder / f"{name}-{self.number}.safetensors")

    def save(self, name: str, model: PeftModel) -> None:
        state = whole_state_dict(model)
        model.save_pretrained(self.folder / name, state_dict=state, is_main_process=self.number == 0)

    def refused(self, name: str, call: Callable[[], Any]) -> None:
        self.said[name] = "nothing"
        try:
            call()
        except UserError as error:
            self.said[name] = str(error)

    # -------------------------------------------------------------------------------------------------- trajectories

    def run(self, name: str, setup: str, steps: int = STEPS, **options: Any) -> None:
        model = adapted("srlora", **{"r": 5, **options})
        parallel, x = model, None
        if setup == "ddp":
            parallel = DistributedDataParallel(model)
        elif setup == "fsdp":
            shard(model)
        elif setup == "hsdp":
            shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
        elif setup == "columns":
            shard(model, shard_placement_fn=lambda p: Shard(int(p.dim() == 2 and p.shape[1] % 2 == 0)))
        else:  # one process: the batches of both ranks together are the same step
            x = torch.cat((inputs(seed=0), inputs(seed=1)))
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=steps)
        self.train(parallel, optimizer, steps, x)
        self.write(name, model, optimizer)

    def trajectories(self) -> None:
        for setup in ("ddp", "fsdp"):
            for reset in RESETS:
                self.run(f"{setup}-{reset}", setup, optimizer_reset=reset)
            # with r=1 the second rank has no row of A at all; with r=3 the history outgrows the layer and is packed
            self.run(f"{setup}-one", setup, r=1, r_target=5, optimizer_reset="corrected")
            self.run(f"{setup}-packed", setup, r=3, steps=10)
        sketched = {"init_weights": "lora", "optimizer_reset": "corrected", "fresh_warmup": 2}
        for setup in ("ddp", "fsdp"):
            self.run(f"{setup}-gradient", setup, reservoir="gradient", select="oldest", **sketched)
        self.run("ddp-inplace", "ddp", fuse_mode="inplace")
        self.run("single", "single")
        self.run("hsdp", "hsdp")
        self.run("columns", "columns", optimizer_reset="corrected")
        lowest = srlora.SRLora.lowest
        with mock.patch.object(srlora.SRLora, "lowest", lambda *args: (lowest(*args) + self.number) % 5):
            self.run("torn", "fsdp")

    # -------------------------------------------------------------------------------------------------------- starts

    @contextmanager
    def other_svd(self, rank: int) -> Iterator[None]:
        """The second rank finds the opposite signs, and only `rank` directions worth having."""

        def negated(svd: Any) -> Any:
            def found(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
                u, s, vh = svd(*args, **options)
                return -u[:, :rank], s[:rank], -vh[:rank]

            return found

        if self.number == 0:
            yield
        else:
            with (
                mock.patch.object(srlora, "usable_svd", negated(srlora.usable_svd)),
                mock.patch.object(srlora, "top_svd", negated(srlora.top_svd)),
            ):
                yield

    def starts(self) -> None:
        weak = Toy()
        with torch.no_grad():  # seven directions, so that a further event needs a new SVD
            weak.first.weight[:, 7:] = 0
            weak.second.weight[:, 7:] = 0
        with self.other_svd(rank=4):
            small = adapted("srlora", r=5)
            self.refused("other rank", lambda: same_start(small))
        with self.other_svd(rank=10):
            late = shard(adapted("srlora", r=5))
            self.refused("sharded start", lambda: attach(late, adamw(late), total_steps=STEPS))
            replicated, sharded = adapted("srlora", r=5), adapted("srlora", r=5)
            renewed = get_peft_model(weak, config("srlora", r=5, exhaustion="resvd"))
            for name, model in (("ddp-start", replicated), ("fsdp-start", sharded), ("renewed", renewed)):
                parallel = model
                if model is replicated:
                    parallel = DistributedDataParallel(model, broadcast_buffers=False)
                else:
                    same_start(model)
                    shard(model)
                optimizer = adamw(model)
                attach(model, optimizer, total_steps=STEPS)
                self.train(parallel, optimizer, STEPS)
                self.write(name, model, optimizer)

    # --------------------------------------------------------------------------------------------------------- files

    def files(self) -> None:
        marked = shard(adapted("srlora", r=5, target_modules=["first"], modules_to_save=["second"]))
        for p in trainable(marked):
            local(p).fill_(self.number + 1)
        self.save("marked", marked)
        self.refused("parts", lambda: marked.save_pretrained(self.folder / "parts"))

        model = shard(adapted("srlora", r=5))
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=STEPS)
        self.train(model, optimizer, STOP)
        with torch.no_grad():
            y = model(self.x)
        self.write("output", model, x=self.x, y=y)
        self.save("stopped", model)
        state = get_optimizer_state_dict(model, optimizer, options=FULL)
        dist.barrier()
        resumed: Any = PeftModel.from_pretrained(Toy(), self.folder / "stopped", is_trainable=True)
        fully_shard(resumed)  # all in the root
        optimizer = adamw(resumed)
        set_optimizer_state_dict(resumed, optimizer, state, options=replace(FULL, broadcast_from_rank0=True))
        with torch.no_grad():
            resumed(self.x)  # leaves FSDP2's root unsharded
        attach(resumed, optimizer)
        for _ in range(STEPS - STOP):
            (resumed(self.x) - 1).square().mean().backward()
            with torch.no_grad():
                resumed(self.x)
            optimizer.step()
            optimizer.zero_grad()
        self.write("resumed", resumed, optimizer)

    # ------------------------------------------------------------------------------------------- scaler and refusals

    def overflow(self, fused: bool) -> None:
        """In the rows that one rank alone holds."""
        model = shard(adapted("srlora", r=5))
        optimizer, scaler = adamw(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        attach(model, optimizer, total_steps=STEPS)
        for step in range(STEPS):
            scaler.scale(model(self.x).square().mean()).backward()
            if step == 3 and self.number == 1:
                local(views(model)[0].A.grad).fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        self.write(f"overflow-{fused}", model, optimizer)

    def refusals(self) -> None:
        folded = shard(adapted("srlora-inplace", r=5))
        self.refused("inplace", lambda: attach(folded, adamw(folded), total_steps=STEPS))
        half = shard(adapted("srlora", r=5), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        self.refused("half", lambda: half(self.x))
        plain = shard(adapted("srlora", r=5))
        with mock.patch.object(srlora.SRLora, "extra_loss"):
            self.refused("loss", lambda: attach(plain, adamw(plain), total_steps=STEPS))
        for original in (True, False):
            inside = adapted("srlora", r=5).requires_grad_(True)
            flat = FullyShardedDataParallel(inside, use_orig_params=original, device_id=torch.device("cpu"))
            optimizer = torch.optim.AdamW(flat.parameters())
            for name, module in (("flat", flat), ("inside", inside)):
                self.refused(f"{name} {original}", lambda m=module, o=optimizer: attach(m, o, total_steps=STEPS))


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = Rank(folder)
    rank.trajectories()
    rank.starts()
    rank.files()
    rank.overflow(fused=False)
    rank.overflow(fused=True)
    rank.refusals()
    (folder / f"said-{rank.number}.json").write_text(json.dumps(rank.said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
