"""Replays Fira's golden trajectories: AdamW with both alphas, and RMSProp."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from subspace import close, parameters, play, scalar, with_bases

from loratlas.optim.fira import FiraAdamW, FiraRMSProp


def replay(path: Path) -> None:
    golden = load_file(path)
    named = parameters(golden)
    groups = []
    for name, p in named.items():
        group = {"params": [p]}
        if p.dim() == 2:
            group |= {"rank": int(scalar(golden, f"rank_{name}")), "alpha": scalar(golden, "alpha")}
        groups.append(group)
    options = {"lr": scalar(golden, "lr"), "eps": scalar(golden, "eps"), "gamma": scalar(golden, "gamma", 1.01)}
    options |= {"update_proj_gap": int(scalar(golden, "gap")), "weight_decay": scalar(golden, "weight_decay", 0)}
    if "scalar.beta" in golden:
        optimizer = with_bases(FiraRMSProp, golden, named)(groups, beta=scalar(golden, "beta"), **options)
    else:
        betas = (scalar(golden, "beta1"), scalar(golden, "beta2"))
        optimizer = with_bases(FiraAdamW, golden, named)(groups, betas=betas, **options)

    def check(name: str, t: int) -> None:
        state = optimizer.state[named[name]]
        found = [key.split(".")[1] for key in golden if key.startswith("state.") and key.endswith(f".{name}.{t}")]
        assert found
        for key in found:
            theirs = golden[f"state.{key}.{name}.{t}"]
            if key == "scaling_grad":
                close(f"{key}.{name}.{t}", state["residual_norm"], theirs.reshape(()), tolerance=0, relative=1e-6)
            else:
                close(f"{key}.{name}.{t}", state[key], theirs)

    play(golden, named, optimizer, check)
