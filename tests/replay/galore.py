"""Replays GaLore's golden trajectories: AdamW with every kind of projection, and Adafactor."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from subspace import close, parameters, play, scalar, with_bases

from loratlas.optim.galore import GaLoreAdafactor, GaLoreAdamW

# what the README says of the files that hold several kinds
KINDS = {
    "tall_rev": "reverse_std",
    "wide_rev": "reverse_std",
    "sq_right": "right",
    "sq_left": "left",
    "full": "full",
}


def replay(path: Path) -> None:
    golden = load_file(path)
    named = parameters(golden)
    groups = []
    for name, p in named.items():
        group = {"params": [p]}
        if p.dim() == 2:
            rank = int(scalar(golden, f"rank_{name}", scalar(golden, "rank", 3)))
            group |= {"rank": rank, "proj_type": KINDS.get(name, "std")}
        groups.append(group)
    options = {"lr": scalar(golden, "lr"), "weight_decay": scalar(golden, "weight_decay")}
    options |= {"update_proj_gap": int(scalar(golden, "gap")), "scale": scalar(golden, "scale")}
    if "scalar.clip_threshold" in golden:
        optimizer = with_bases(GaLoreAdafactor, golden, named)(
            groups,
            eps=(scalar(golden, "eps0"), scalar(golden, "eps1")),
            clip_threshold=scalar(golden, "clip_threshold"),
            decay_rate=scalar(golden, "decay_rate"),
            beta1=scalar(golden, "beta1"),
            relative_step=False,
            scale_parameter=False,
            **options,
        )
    else:
        betas = (scalar(golden, "beta1"), scalar(golden, "beta2"))
        make = with_bases(GaLoreAdamW, golden, named)
        optimizer = make(groups, betas=betas, eps=scalar(golden, "eps"), **options)

    def check(name: str, t: int) -> None:
        state = optimizer.state[named[name]]
        found = [key.split(".")[1] for key in golden if key.startswith("state.") and key.endswith(f".{name}.{t}")]
        assert found
        for key in found:
            close(f"{key}.{name}.{t}", state[key], golden[f"state.{key}.{name}.{t}"])

    play(golden, named, optimizer, check)
