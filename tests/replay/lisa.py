"""Replays LISA golden trajectories: the official callback with the blocks that its generator drew."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from loratlas.strategies.lisa import LisaConfig


class Layers(nn.Module):
    def __init__(self, vocab: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)


class Model(nn.Module):
    def __init__(self, vocab: int, width: int, depth: int) -> None:
        super().__init__()
        self.model = Layers(vocab, width, depth)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.model.embed(x)
        for layer in self.model.layers:
            z = z + torch.tanh(layer(z))
        return self.lm_head(self.model.norm(z))


def replay(path: Path) -> None:
    """Replay one file; raises AssertionError at the first value that differs."""
    golden = load_file(path)
    depth = sum(name.startswith("param.model.layers.") and name.endswith("weight.init") for name in golden)
    vocab, width = golden["param.model.embed.weight.init"].shape
    model = Model(vocab, width, depth)
    model.load_state_dict({name: golden[f"param.{name}.init"] for name in model.state_dict()})
    lr, decay = float(golden["scalar.lr"]), float(golden["scalar.weight_decay"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    interval = int(golden["scalar.interval"])
    steps = sum(name.startswith("loss.") for name in golden)

    class Drawn(LisaConfig):
        def active(self, blocks: int, period: int) -> list[int]:
            return golden[f"active.{min(period * interval, steps - 1)}"].tolist()

    sampling = Drawn(num_active_layers=int(golden["scalar.n_layers"]), interval_steps=interval).build()
    sampling.attach(model, optimizer)
    counts: dict[str, int] = defaultdict(int)
    for step in range(steps):
        assert sampling.active == golden[f"active.{step}"].tolist(), f"active.{step}"
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        loss = F.cross_entropy(model(golden[f"x.{step}"]).flatten(0, -2), golden[f"y.{step}"].flatten())
        close(f"loss.{step}", loss, golden[f"loss.{step}"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, p in model.named_parameters():
            counts[name] += name in trains
            assert torch.equal(p, before[name]) == (name not in trains), name
            close(f"{name} after {step}", p, golden[f"param.{name}.after{step}"])
    for name, p in model.named_parameters():
        counted = float(optimizer.state[p]["step"]) if p in optimizer.state else -1.0
        assert counted == float(golden[f"adamstep.{name}"]) == (counts[name] or -1), f"adamstep.{name}"


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")
