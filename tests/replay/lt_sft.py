"""Replays LT-SFT golden trajectories: both phases by SGD, the chosen entries and the official file's coding."""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from loratlas.strategies.lt_sft import LtSftConfig
from loratlas.strategies.sparse_delta import SparseDelta

OPTIMIZERS = {"sgd": lambda params, lr: torch.optim.SGD(params, lr=lr)}


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first tensor that differs."""
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        note = file.metadata()
    dense, sparse, rounds = (int(note[name]) for name in ("full_steps", "sparse_steps", "n_ft_iterations"))
    model = network(golden)
    optimizer = OPTIMIZERS[note["optimizer"]](model.parameters(), float(note["lr"]))
    names = json.loads(note["maskable"])
    strategy = LtSftConfig(
        num_params=int(note["k"]), n_iterations=rounds, dense_steps=dense, maskable="|".join(names), ties="official"
    ).build()
    total = rounds * (dense + sparse)
    strategy.attach(model, optimizer, total)
    seen: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    for step in range(total):
        F.mse_loss(model(golden[f"k{step}.x"]), golden[f"k{step}.y"]).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            close(f"k{step}.grad.{name}", seen[name], golden[f"k{step}.grad.{name}"])
            if (step + 1) % (dense + sparse) != dense:
                close(f"k{step}.param.{name}", p, golden[f"k{step}.param.{name}"])
            elif rounds == 1:
                close(f"rewound {name}", p, golden[f"init.{name}"])
        optimizer.zero_grad()
    delta, official = strategy.delta(model), decoded(golden, names, path)
    for name in names:
        assert torch.equal(strategy.state_dict()["masks"][name], golden[f"mask.{name}"].bool()), f"mask.{name}"
        for source, found in (("ours", delta), ("official coding", official)):
            full = torch.zeros_like(golden[f"init.{name}"]).flatten()
            full[found.indices[name].long()] = found.values[name].double()
            close(f"{source} {name}", full.view_as(golden[f"init.{name}"]), golden[f"sft.diff.{name}"])
    for name in ("head.weight", "head.bias"):
        close(name, delta.absolute[name], golden[f"sft.abs.{name}"])


def network(golden: dict[str, Tensor]) -> nn.Module:
    shapes = {name: golden[f"init.{name}.weight"].shape for name in ("fc1", "fc2", "head")}
    layers = {name: nn.Linear(shape[1], shape[0], dtype=torch.float64) for name, shape in shapes.items()}
    chain = (
        ("fc1", layers["fc1"]),
        ("a", nn.Tanh()),
        ("fc2", layers["fc2"]),
        ("b", nn.Tanh()),
        ("head", layers["head"]),
    )
    model = nn.Sequential(OrderedDict(chain))
    model.load_state_dict({key[5:]: value for key, value in golden.items() if key.startswith("init.")})
    return model


def decoded(golden: dict[str, Tensor], names: list[str], path: Path) -> SparseDelta:
    """The official coding of the golden file, through the file that the official library would write."""
    diffs = {
        name: {
            "size": golden[f"init.{name}"].shape,
            "index_steps": golden[f"sft.enc.{name}.index_steps"],
            "values": golden[f"sft.enc.{name}.values"],
        }
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pytorch_diff.bin"
        torch.save({"diffs": diffs, "abs": {}}, file)
        return SparseDelta.load_official(file)


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-9, msg=lambda text: f"{name}: {text}")
