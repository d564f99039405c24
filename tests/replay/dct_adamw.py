"""Replays DCT-AdamW's golden trajectories: both bases, with and without carry-over, error feedback, L2 selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from subspace import close, parameters, play, scalar
from torch import Tensor

from loratlas.linalg import dct
from loratlas.optim.dct_adamw import DCTAdamW


def replay(path: Path) -> None:
    golden = load_file(path)
    named = parameters(golden)
    names = {id(p): name for name, p in named.items()}
    carried = bool(scalar(golden, "rotate_subspace", 0))
    rows = dct.table("dct2", golden["Q"].shape[0], 0, torch.float32, torch.device("cpu"))
    basis = "dct3" if torch.allclose(golden["Q"], rows, atol=1e-6) else "dct2"
    close("Q", dct.table(basis, rows.shape[0], 0, torch.float32, rows.device).T, golden["Q"])

    class Ordered(DCTAdamW):
        """Our set of indices is theirs; where moments are not carried over, their order is taken as well."""

        def choose_bases(self, group: dict[str, Any], parameters: list[Tensor], matrices: list[Tensor]) -> None:
            super().choose_bases(group, parameters, matrices)
            for p in parameters:
                state = self.state[p]
                theirs = golden[f"idx.{names[id(p)]}.{int(state.get('step', 0))}"].to(torch.int32)
                key = "left_index" if "left_index" in state else "right_index"
                assert state[key].tolist() == sorted(theirs.tolist())
                if not carried:
                    state[key] = theirs

    optimizer = Ordered(
        [{"params": [p], "rank": int(scalar(golden, "rank")) if p.dim() == 2 else None} for p in named.values()],
        lr=scalar(golden, "lr"),
        betas=(scalar(golden, "beta1"), scalar(golden, "beta2")),
        eps=scalar(golden, "eps"),
        weight_decay=scalar(golden, "weight_decay"),
        basis=basis,
        update_proj_gap=int(scalar(golden, "update_proj_gap", 1)),
        carry_moments=carried,
        error_feedback="fp" if any(key.startswith("state.ef.") for key in golden) else None,
        select_norm=int(scalar(golden, "ell_norm", 1)),
    )
    # the official rotation has rounding noise where the exact value is 0
    tolerance = 1e-4 if carried else 1e-6

    def check(name: str, t: int) -> None:
        state = optimizer.state[named[name]]
        for ours, theirs in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            found = state[ours]
            if named[name].dim() == 2:
                dim, key = (0, "left_index") if "left_index" in state else (1, "right_index")
                order = [state[key].tolist().index(i) for i in golden[f"idx.{name}.{t}"].tolist()]
                found = found.index_select(dim, torch.tensor(order))
            close(f"{theirs}.{name}.{t}", found, golden[f"state.{theirs}.{name}.{t}"], tolerance)
        if f"state.ef.{name}.{t}" in golden:
            close(f"ef.{name}.{t}", state["error"], golden[f"state.ef.{name}.{t}"], tolerance)

    play(golden, named, optimizer, check, tolerance)
