"""LoRA-Pro (arXiv 2407.18242): moves the factors so that B A goes where full fine-tuning would take the weight.

A step (dA, dB) of the factors moves W by s B dA + s dB A. LoRA's own gradients make a poor choice of it; LoRA-Pro takes
the one nearest to the gradient of W, in closed form from the gradients of A and B (see `linalg.tangent`), with small
r x r solves for all layers at once. What it does with Adam is the mode:

| mode | pairs move by | state |
|---|---|---|
| "efficient" | AdamW on the adjusted gradients of A and B | that of AdamW on A and B |
| "full" | Adam in the space of W on s B dA + s dB A, its direction adjusted again, plain descent | twice out x in |
| "sgd" | plain descent along the adjusted gradients | none |

Full mode, step t, with (dA, dB) the adjusted gradients for X = 0:

    g~ = s B dA + s dB A          m <- b1 m + (1 - b1) g~          v <- b2 v + (1 - b2) g~^2
    g  = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    (A, B) <- (A, B) - lr adjusted(s B^T g, s g A^T)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loratlas.engine.config import knob
from loratlas.engine.pair_registry import LowRankPair, low_rank_pairs, other_parameters
from loratlas.engine.parts import OptimizerConfig
from loratlas.errors import UserError
from loratlas.linalg.stacks import in_stacks
from loratlas.linalg.tangent import X_MODES, tangent_factors
from loratlas.optim.adamw import adamw_

MODES = ("efficient", "full", "sgd")
_NAME = "LoRA-Pro"
_FIXED = ("mode", "x_mode", "momentum_dtype")  # what a resumed run may not change
Move = tuple[Tensor, Tensor]


@dataclass
class LoraProConfig(OptimizerConfig):
    """Options of LoRA-Pro.

    Raises:
        UserError: a field is out of its range.
    """

    name: ClassVar[str] = "lora-pro"
    needs_pairs: ClassVar[bool] = True

    mode: str = knob(
        "efficient",
        "'efficient': AdamW on the adjusted gradients, memory as LoRA. 'full': Adam in the space of the weights, two "
        "matrices of their size per layer. 'sgd': no moments.",
    )
    x_mode: str = knob(
        "sylvester", "How A and B divide the move: 'sylvester' (nearest to their own gradients), 'zero' or 'symmetry'."
    )
    beta1: float = knob(0.9, "Moving average of the gradient.")
    beta2: float = knob(0.999, "Moving average of its square.")
    eps: float = knob(1e-8, "Added to the root of the second moment.")
    jitter: float = knob(1e-8, "Added to B^T B and A A^T in the solves, relative to their mean eigenvalue.")
    momentum_dtype: str = knob(
        "float32",
        "Of full mode's first moment: 'float32' or 'bfloat16'. The second stays in float32, since in bfloat16 it could "
        "never fall.",
    )

    def __post_init__(self) -> None:
        self._require(self.mode in MODES, "mode", f"one of {', '.join(MODES)}")
        self._require(self.x_mode in X_MODES, "x_mode", f"one of {', '.join(X_MODES)}")
        for name in ("beta1", "beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")
        for name in ("eps", "jitter"):
            self._require(getattr(self, name) >= 0.0, name, "at least 0")
        self._require(self.momentum_dtype in ("float32", "bfloat16"), "momentum_dtype", "'float32' or 'bfloat16'")
        unused = self.mode != "full" and self.momentum_dtype != "float32"
        self._require(not unused, "momentum_dtype", f"'float32' with mode={self.mode!r}, which keeps no such moment")

    def check(self, model: nn.Module) -> None:
        _pairs(model, self.mode)

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> LoraPro:
        return LoraPro(model, lr, weight_decay=weight_decay, **{f.name: getattr(self, f.name) for f in fields(self)})


class LoraPro(Optimizer):
    """LoRA-Pro for every trainable low-rank pair of `model`; what else trains (a head, biases) gets AdamW.

        optimizer = LoraPro(model, lr=1e-3)               # model: PEFT's LoRA, or an adapter of ours with pairs

    Adjusts inside `step`, so gradients may be accumulated, all-reduced, unscaled and clipped before. Gradients stay as
    they are. A pair without gradients stands still.

    Args:
        model: the PEFT model.
        lr: of "full" it compares with full fine-tuning's learning rate, of the other modes with LoRA's.
        weight_decay: decoupled; of A and B it pulls the factors towards 0.

    The other arguments are the fields of `LoraProConfig`.

    Raises:
        UserError: the model has no pairs or pairs that cannot be used (see `pair_registry`), an option is out of its
            range, or a state is loaded that another mode saved.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
        config = LoraProConfig(**options)
        self.pairs = _pairs(model, config.mode)
        fixed = {name: getattr(config, name) for name in (*_FIXED, "jitter")}
        factors = [p for pair in self.pairs for p in (pair.a, pair.b)]
        # what a slot of A and B was moved by is kept for that slot only where Adam runs on A and B themselves
        groups = [{"params": factors, "slot_moments": config.mode == "efficient", **fixed}]
        if others := other_parameters(model, self.pairs):
            groups.append({"params": others})
        betas = (config.beta1, config.beta2)
        defaults = {"lr": lr, "betas": betas, "eps": config.eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "decoupled_weight_decay": True})
        self.register_load_state_dict_pre_hook(_refuse_other_mode)
        self.register_load_state_dict_post_hook(_restore_momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_pairs, *others = self.param_groups
        self._move_pairs(of_pairs)
        for group in others:
            moved = [p for p in group["params"] if p.grad is not None]
            adamw_(self.state, group, moved, [p.grad for p in moved])
        return loss

    def _move_pairs(self, group: dict[str, Any]) -> None:
        found = [(pair, grads) for pair in self.pairs if pair.scaling and (grads := pair.gradients()) is not None]
        if not found:
            return
        pairs, moves = [pair for pair, _ in found], [grads for _, grads in found]
        if group["mode"] == "full":
            moves = _adjusted(pairs, moves, group, x_mode="zero")
            moves = [self._direction(pair, move, group) for pair, move in zip(pairs, moves, strict=True)]
        moves = _adjusted(pairs, moves, group, x_mode=group["x_mode"])
        params: list[Tensor] = [p for pair in pairs for p in (pair.a, pair.b)]
        changes = [change.view_as(p).to(p.dtype) for p, change in zip(params, sum(moves, ()), strict=True)]
        if group["mode"] == "efficient":
            adamw_(self.state, group, params, changes)
            return
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, changes, alpha=-group["lr"])

    def _direction(self, pair: LowRankPair, move: Move, group: dict[str, Any]) -> Move:
        """Adam in the space of W: (s B^T g, s g A^T) of its direction g for the move (dA, dB). Layer by layer, so that
        one matrix of the weight's size is in memory beside the moments."""
        a, b, s = pair.down.to(move[0].dtype), pair.up.to(move[0].dtype), pair.scaling
        state = self.state[pair.a]
        if not state:
            zeros = torch.zeros(pair.shape, device=a.device, dtype=a.dtype)
            momentum = zeros.to(getattr(torch, group["momentum_dtype"]))
            state.update(step=torch.zeros(()), exp_avg=momentum.clone(), exp_avg_sq=zeros)
        state["step"] += 1
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        target = (b @ move[0]).addmm_(move[1], a).mul_(s)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.mul_(beta1).add_(target, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(target, target, value=1 - beta2)
        size = torch.sqrt(second, out=target).div_((1 - beta2**t) ** 0.5).add_(group["eps"])
        direction = torch.div(first, size, out=size).mul_(s / (1 - beta1**t))
        return b.T @ direction, direction @ a.T


def _adjusted(pairs: Sequence[LowRankPair], grads: Sequence[Move], group: dict[str, Any], x_mode: str) -> list[Any]:
    """[(dA, dB)] for [(gA, gB)], of all pairs at once."""
    items = [
        (pair.down, pair.up, *move, move[0].new_full((), pair.scaling)) for pair, move in zip(pairs, grads, strict=True)
    ]
    try:
        return in_stacks(partial(tangent_factors, x_mode=x_mode, jitter=group["jitter"]), items)
    except torch.linalg.LinAlgError:
        bad = next((p.path for p in pairs if not (p.down.isfinite().all() and p.up.isfinite().all())), None)
        if bad is None:
            raise
        raise UserError(
            f"LoRA-Pro: the factors of {bad} hold NaN or infinite entries: go back to a checkpoint from before, and "
            "lower the learning rate."
        ) from None


def _pairs(model: nn.Module, mode: str) -> list[LowRankPair]:
    pairs = low_rank_pairs(model, _NAME)
    for pair in pairs:
        if mode == "full" and pair.kind == "embedding":
            raise UserError(
                f"LoRA-Pro's full mode would keep two {pair.shape[0]} x {pair.shape[1]} matrices for the embedding "
                f"{pair.path}: use mode='efficient', or leave the embedding out of target_modules."
            )
    return pairs


def _refuse_other_mode(optimizer: Optimizer, state: dict[str, Any]) -> None:
    ours, saved = optimizer.param_groups[0], state["param_groups"][0]
    for name in _FIXED:
        if saved.get(name) != ours[name]:
            found = f"{name}={saved[name]!r}" if name in saved else "another optimizer"
            raise UserError(
                f"this optimizer state was saved with {found}, and LoRA-Pro is set up with {name}={ours[name]!r}: "
                "build it as it was."
            )


def _restore_momentum(optimizer: Optimizer) -> None:
    """torch gives loaded moments the parameter's dtype."""
    group = optimizer.param_groups[0]
    for p in group["params"] if group["mode"] == "full" else ():
        if "exp_avg" in optimizer.state.get(p, {}):
            optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to(getattr(torch, group["momentum_dtype"]))
