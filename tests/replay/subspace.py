"""What the replays of GaLore, Fira and DCT-AdamW share: parameters by name, bases and indices put in from the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def scalar(golden: dict[str, Tensor], name: str, default: float | None = None) -> float:
    """A hyperparameter as the decimal number that was written: its float32 neighbour shifts 1 - b2 by 1e-5."""
    if f"scalar.{name}" not in golden:
        assert default is not None, name
        return default
    return float(f"{float(golden[f'scalar.{name}']):.6g}")


def parameters(golden: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    names = [key.split(".")[1] for key in golden if key.startswith("param.") and key.endswith(".init")]
    return {name: nn.Parameter(golden[f"param.{name}.init"].clone()) for name in names}


def with_bases(cls: type[Any], golden: dict[str, Tensor], named: dict[str, nn.Parameter]) -> type[Any]:
    """The optimizer with the file's projection in force at every step, once its own was compared with it."""
    names = {id(p): name for name, p in named.items()}

    class Given(cls):  # type: ignore[misc]
        def choose_bases(self, group: dict[str, Any], parameters: list[Tensor], matrices: list[Tensor]) -> None:
            super().choose_bases(group, parameters, matrices)
            for p in parameters:
                step = int(self.state[p].get("step", 0))
                for key, side in (("proj", None), ("projL", "left"), ("projR", "right")):
                    theirs = golden.get(f"{key}.{names[id(p)]}.{step}")
                    if theirs is None:
                        continue
                    side = side or next(name for name in ("left", "right") if name in self.state[p])
                    # columns on the left in the file, rows everywhere here
                    rows = (theirs.T if side == "left" else theirs).contiguous()
                    ours = self.state[p][side]
                    close(f"{key}.{names[id(p)]}.{step}", ours.T @ ours, rows.T @ rows, tolerance=1e-5)
                    self.state[p][side] = rows

    return Given


def play(
    golden: dict[str, Tensor],
    named: dict[str, nn.Parameter],
    optimizer: Optimizer,
    check: Callable[[str, int], None],
    tolerance: float = 1e-6,
) -> None:
    """Step through all gradients; weights are compared after every step, `check(name, t)` compares states."""
    t = 0
    while f"grad.{next(iter(named))}.{t}" in golden:
        for name, p in named.items():
            p.grad = golden[f"grad.{name}.{t}"].clone()
        optimizer.step()
        for name, p in named.items():
            close(f"param.{name}.after{t}", p, golden[f"param.{name}.after{t}"], tolerance)
            check(name, t)
        t += 1
    assert t > 0


def close(name: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-6, relative: float = 0.0) -> None:
    def message(text: str) -> str:
        return f"{name}: {text}"

    torch.testing.assert_close(ours.detach(), theirs, rtol=relative, atol=tolerance, msg=message)
