"""LoRA-GGPO and LoRA-MGPO (arXiv 2502.14538, v1 and v3), and Flat-LoRA: AdamW towards flatter minima of LoRA.

While training, adapted layers compute with W' + eps, W' = W + s B A, at the price of one forward and backward:

| method | eps |
|---|---|
| "ggpo" | Gaussian; the variance of row i is sigma^2 / in (||W'_i||^2 + beta ||g_i||^2) |
| "flat" | the same with beta = 0: Flat-LoRA (arXiv 2409.14396) |
| "mgpo" | -rho v / ||v||_F min(1 / gbar, max_scale),   v = s (mB A + B mA) |

g = s (gB A + B gA), of the last step, stands in for the gradient of W; m are AdamW's first moments and gbar the moving
average of ||g||_F. eps stays the same within an optimizer step. It is added to the layer's output as x eps^T and never
to a weight, which may therefore be shared, quantised, merged or saved at any time.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from loratlas.engine.config import knob
from loratlas.engine.pair_registry import LowRankPair, low_rank_pairs
from loratlas.engine.parts import OptimizerConfig
from loratlas.errors import UserError
from loratlas.optim.perturbation import Noise, Term, gradient_rows, momentum_directions, noise_std

METHODS = ("ggpo", "mgpo", "flat")
_NAME = "LoRA-GGPO"


@dataclass
class LoraGgpoConfig(OptimizerConfig):
    """Options of LoRA-GGPO, LoRA-MGPO and Flat-LoRA.

    Raises:
        UserError: a field is out of its range.
    """

    name: ClassVar[str] = "lora-ggpo"
    needs_pairs: ClassVar[bool] = True

    method: str = knob(
        "ggpo", "'ggpo': noise scaled by weight and gradient. 'flat': by weight. 'mgpo': along momentum."
    )
    sigma: float = knob(0.03, "Size of the noise of 'ggpo' and 'flat'; Flat-LoRA's authors use 0.05.")
    beta: float = knob(0.01, "Weight of the gradient's norm in the noise of 'ggpo'.")
    rho: float = knob(0.05, "Size of the perturbation of 'mgpo'; its authors use 0.05 for NLU and 0.01 for NLG.")
    ema_beta: float = knob(0.9, "Moving average of the gradient's norm in 'mgpo'; 0.8 for NLG.")
    max_scale: float = knob(10.0, "Upper bound of 1 / gbar in 'mgpo'.")
    beta1: float = knob(0.9, "AdamW's moving average of the gradient; 'mgpo' perturbs along it; 0.8 for NLG.")
    beta2: float = knob(0.999, "AdamW's moving average of the squared gradient.")
    eps: float = knob(1e-8, "Added by AdamW to the root of the second moment.")
    seed: int = knob(0, "Seed of the noise.")

    def __post_init__(self) -> None:
        self._require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        for name in ("sigma", "beta", "rho", "eps"):
            self._require(getattr(self, name) >= 0.0, name, "at least 0")
        self._require(self.max_scale > 0.0, "max_scale", "positive")
        for name in ("ema_beta", "beta1", "beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")

    def check(self, model: nn.Module) -> None:
        _linear_pairs(model)

    def build(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> PerturbedAdamW:
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        return PerturbedAdamW(model, lr, weight_decay=weight_decay, **options)


class PerturbedAdamW(AdamW):
    """AdamW over everything that trains in `model`, whose linear layers with low-rank pairs compute perturbed.

        optimizer = PerturbedAdamW(model, lr=1e-3, method="mgpo")     # nothing else changes in the loop or Trainer
        optimizer.remove()                                            # from now on it is AdamW

    Perturbed is the forward in training mode with gradients on, of layers whose adapter is active and not merged;
    under `eval` or `no_grad` the model is what it will be when it is saved. Pairs of convolutions and embeddings
    train unperturbed, as in the official code. The noise depends on (seed, step, layer) alone, so that all ranks of a
    distributed run, and recomputation under gradient checkpointing, see the same.

    Args:
        model: the PEFT model. weight_decay: decoupled.

    The other arguments are the fields of `LoraGgpoConfig`.

    Raises:
        UserError: the model has no linear layer with a pair, or pairs that cannot be used (see `pair_registry`); an
            option is out of its range; a state is loaded that another method saved; gradient checkpointing is of the
            reentrant kind, which computes without gradients first and so without the perturbation.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
        self.options = config = LoraGgpoConfig(**options)
        self.pairs = _linear_pairs(model)
        # kept in a group, because that is saved and loaded with it
        counted = {"perturbation": config.method, "perturbed_steps": 0}
        params = [p for p in model.parameters() if p.requires_grad]
        betas = (config.beta1, config.beta2)
        super().__init__([{"params": params, **counted}], lr, betas, config.eps, weight_decay)
        self._terms: dict[int, Term] | None = None  # of this step, by pair; made when a forward asks for them
        self._ran_plain: set[int] = set()
        self._measured: list[tuple[LowRankPair, Tensor]] = []
        # functions of the optimizer they are called with: a hook that held it would keep it alive
        self._handles: list[Any] = [
            self.register_step_pre_hook(_measure),
            self.register_step_post_hook(_remember),
            self.register_load_state_dict_pre_hook(_refuse_other_method),
            self.register_load_state_dict_post_hook(_forget_terms),
            *(pair.layer.register_forward_hook(_Hook(self, i)) for i, pair in enumerate(self.pairs)),
        ]

    def remove(self) -> None:
        """Take the perturbation off the model; the optimizer is a plain AdamW afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def perturbed(self, index: int, x: Tensor, output: Tensor) -> Tensor:
        """`output` of the layer of pair number `index` for input `x`, perturbed if it is to be."""
        pair = self.pairs[index]
        if not (pair.layer.training and pair.in_use()):
            return output
        if not torch.is_grad_enabled():
            self._ran_plain.add(index)
            return output
        if torch._C._current_graph_task_id() != -1 and index in self._ran_plain:  # recomputed by a backward pass
            raise UserError(
                f"{_NAME}: reentrant gradient checkpointing runs the layers without gradients first, where they are "
                "not perturbed: set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._ran_plain.discard(index)
        if self._terms is None:
            with torch.no_grad():
                self._terms = self._make_terms()
        term = self._terms.get(index)
        return output if term is None else output + term(x).to(output.dtype)

    def _make_terms(self) -> dict[int, Term]:
        config, step = self.options, self.param_groups[0]["perturbed_steps"]
        known: list[dict[str, Tensor]] = [self.state.get(pair.a, {}) for pair in self.pairs]
        if config.method == "mgpo":
            moved = [i for i, state in enumerate(known) if "grad_norm" in state]
            pairs, norms = [self.pairs[i] for i in moved], [known[i]["grad_norm"] for i in moved]
            made = momentum_directions(pairs, self, norms, config.rho, config.max_scale)
            return dict(zip(moved, made, strict=True)) if config.rho else {}
        if config.sigma == 0.0:
            return {}
        beta = config.beta if config.method == "ggpo" else 0.0
        keys = [((config.seed * 1_000_003 + step) * 1_000_003 + i) % 2**63 for i in range(len(known))]
        return {
            i: Noise(noise_std(pair, known[i].get("grad_rows"), config.sigma, beta), keys[i])
            for i, pair in enumerate(self.pairs)
        }


class _Hook:
    """Forward hook of one layer. It does not keep the optimizer alive, and does nothing in a copy of the model."""

    def __init__(self, optimizer: PerturbedAdamW | None, index: int) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        optimizer = self.optimizer()
        return output if optimizer is None else optimizer.perturbed(self.index, args[0], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, self.index)


def _linear_pairs(model: nn.Module) -> list[LowRankPair]:
    pairs = [pair for pair in low_rank_pairs(model, _NAME) if pair.kind == "linear"]
    if not pairs:
        raise UserError(
            f"{_NAME} perturbs linear layers, and no pair of {type(model).__name__} lies on one: adapt some."
        )
    for pair in pairs:
        hooks = pair.layer._forward_hooks.values()
        if any(isinstance(hook, _Hook) and hook.optimizer() is not None for hook in hooks):
            raise UserError(f"another optimizer perturbs {pair.path} already: call its remove() first.")
    return pairs


@torch.no_grad()
def _measure(optimizer: PerturbedAdamW, *_: Any) -> None:
    """What the next step's perturbation needs of this step's gradients, and of A and B before they move."""
    if optimizer.options.method != "flat":
        moving = [pair for pair in optimizer.pairs if pair.gradients() is not None]
        optimizer._measured = list(zip(moving, gradient_rows(moving), strict=True))


@torch.no_grad()
def _remember(optimizer: PerturbedAdamW, *_: Any) -> None:
    """Put it into the state, which AdamW has made by now, and count the step."""
    for pair, rows in optimizer._measured:
        state, beta = optimizer.state[pair.a], optimizer.options.ema_beta
        if optimizer.options.method == "ggpo":
            state["grad_rows"] = rows
        else:
            norm = rows.sum().sqrt()
            state["grad_norm"] = beta * state["grad_norm"] + (1 - beta) * norm if "grad_norm" in state else norm
    optimizer._measured = []
    optimizer.param_groups[0]["perturbed_steps"] += 1
    _forget_terms(optimizer)


def _forget_terms(optimizer: Any) -> None:
    optimizer._terms = None


def _refuse_other_method(optimizer: Optimizer, state: dict[str, Any]) -> None:
    ours, saved = (groups[0].get("perturbation") for groups in (optimizer.param_groups, state["param_groups"]))
    if saved != ours:
        found = "another optimizer" if saved is None else f"method={saved!r}"
        raise UserError(
            f"this optimizer state was saved with {found}, and {_NAME} is set up with method={ours!r}: build it as it "
            "was."
        )
