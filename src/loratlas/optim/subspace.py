"""`SubspaceOptimizer`: a rule (Adam, RMSProp, Adafactor) on projected gradients, below GaLore, Fira and DCT-AdamW.

    every T steps:   P <- basis of G;  moments kept, carried over or set to 0
    every step:      R = down(G);  N = rule(R);  W <- W - size scale back(N), what lies outside by the residual's policy

Parameter groups with a `rank` are projected, all others take the rule as it is. Convolutions count as matrices
(out, in k k). Parameters of equal shape are worked on together, so that choosing a basis and Adam are few kernels for
many layers; at most `_CHUNK` numbers at a time, so that temporaries stay small.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from loratlas.engine.sharded import is_sharded
from loratlas.errors import UserError
from loratlas.linalg.svd import result_dtype
from loratlas.optim.layerwise import Layerwise
from loratlas.optim.projector import Projector
from loratlas.optim.residual import Feedback, Scaled
from loratlas.optim.rules import Group, Rule

MOMENTS = ("keep", "permute", "reset")
STATE_DTYPES = ("float32", "weight")
# options of a group with which its state was made
_OF_THE_STATE = ("rank", "basis", "proj_type", "seed", "state_dtype", "error_feedback")
_CHUNK = 2**24

DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "rank": None,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "basis": "svd",
    "moments": "keep",
    "select_norm": 1,
    "evaluation": "auto",
    "svd_method": "auto",
    "seed": 0,
    "state_dtype": "float32",
    "residual_mode": None,
    "error_feedback": None,
}


class SubspaceOptimizer(Optimizer):
    """Options of a parameter group, beside those of the rule:

    Attributes:
        rank: r; None for parameters that are not projected.
        update_proj_gap: T, steps from one choice of the basis to the next.
        scale: multiplies the step along the subspace.
        proj_type, basis, select_norm, evaluation, svd_method, seed: see `projector.Projector`.
        moments: at a new basis "keep" leaves the moments as they are, "permute" gives those of a vector that is in both
            bases to it and 0 to the others, "reset" starts Adam again.
        state_dtype: "float32" (float64 for float64 weights) or "weight", the dtype of the weights.
        residual_mode: None, or "official" or "paper" for Fira's residual, with gamma and scaling.
        error_feedback: None, "fp", "int8" or "int4".
        layerwise: update every parameter inside the backward pass, as soon as its gradient is complete, and free it.

    Raises:
        UserError: an option out of its range; a group with a rank that holds a parameter of one dimension or a shard;
            while stepping, sparse gradients, and gradients that are not finite where a basis is to be chosen.
    """

    rule: ClassVar[Rule]
    # the basis is chosen at steps 1, T + 1, 2 T + 1, ... (counted from 1); True: at 1, T, 2 T, ...
    counts_from_one: ClassVar[bool] = False

    def __init__(self, params: Any, defaults: dict[str, Any], layerwise: bool = False) -> None:
        self._layerwise = Layerwise(self) if layerwise else None
        super().__init__(params, {**DEFAULTS, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["slot_moments"] = group["rank"] is None  # see `engine.moments`: projected moments are of no single row
        try:
            self._check(group)
        except UserError:
            self.param_groups.pop()
            raise
        if self._layerwise is not None:
            self._layerwise.watch(len(self.param_groups) - 1, group["params"])

    # ------------------------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layerwise is not None:
            self._layerwise.end_of_step()
        self.update([(group, group["params"]) for group in self.param_groups])
        return loss

    @torch.no_grad()
    def update(self, chosen: Iterable[tuple[Group, Sequence[Tensor]]]) -> None:
        """One step of those parameters of a group that have gradients; if it raises, nothing has moved."""
        work = [
            (group, together, count)
            for group, parameters in chosen
            for together, count in self._alike(group, [p for p in parameters if p.grad is not None])
        ]
        self._refuse_broken(work)
        for group, together, count in work:
            step = self._plain if group["rank"] is None else self._projected
            step(group, together, count)
            for p in together:
                self.state[p]["step"] = torch.tensor(float(count))

    def _alike(self, group: Group, parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], int]]:
        """Parameters that can be worked on together, with the number of their step, from 1."""
        found: dict[Any, list[Tensor]] = {}
        for p in parameters:
            assert p.grad is not None
            count = int(self.state[p].get("step", 0)) + 1
            shape = None if group["rank"] is None else _flat(p).shape
            found.setdefault((count, shape, p.dtype, p.grad.dtype, p.device), []).append(p)
        for (count, shape, *_), together in found.items():
            size = len(together) if shape is None else max(1, _CHUNK // shape.numel())
            for start in range(0, len(together), size):
                yield together[start : start + size], count

    def _plain(self, group: Group, parameters: list[Tensor], count: int) -> None:
        weights = [p.detach() for p in parameters]
        grads = [_gradient(p).to(_dtype(group, p)) for p in parameters]
        states = [self.state[p] for p in parameters]
        rates = self.rule.rates(group, weights, count)
        if self.rule.decays_first(group):
            _decay(weights, rates, group)
        self.rule.plain(weights, grads, states, group, count, rates)
        if not self.rule.decays_first(group):
            _decay(weights, rates, group)

    def _projected(self, group: Group, parameters: list[Tensor], count: int) -> None:
        projector = projector_of(group)
        states = [self.state[p] for p in parameters]
        weights = [_flat(p.detach()) for p in parameters]
        matrices = [_flat(_gradient(p)).to(_dtype(group, p)) for p in parameters]
        feedback = Feedback(group["error_feedback"]) if group["error_feedback"] else None
        if feedback:
            matrices = [feedback.with_error(matrix, state) for matrix, state in zip(matrices, states, strict=True)]
        if self._due(group, count):
            self.choose_bases(group, parameters, matrices)
        shape, dtype = tuple(matrices[0].shape), matrices[0].dtype
        bases = [projector.bases(state, shape, dtype) for state in states]
        reduced = [basis.down(matrix) for matrix, basis in zip(matrices, bases, strict=True)]

        age = self._since_refresh(group, count) if group["moments"] == "reset" else count
        rates = self.rule.rates(group, weights, age)
        steps, size = self.rule.normalise(reduced, states, group, age, rates)
        if self.rule.decays_first(group):
            _decay(weights, rates, group)
        if group["residual_mode"] is not None:
            Scaled(group).apply(weights, matrices, reduced, steps, bases, states, size)
        else:
            for weight, step, basis in zip(weights, steps, bases, strict=True):
                basis.add_back(weight, step, -size * float(group["scale"]))
        if feedback:
            for matrix, r, basis, state in zip(matrices, reduced, bases, states, strict=True):
                feedback.keep(matrix, r, basis, state)
        if not self.rule.decays_first(group):
            _decay(weights, rates, group)
        for p, weight in zip(parameters, weights, strict=True):
            if weight.data_ptr() != p.data_ptr():  # a memory format that has no matrix as a view
                p.copy_(weight.view(p.shape))

    def choose_bases(self, group: Group, parameters: list[Tensor], matrices: list[Tensor]) -> None:
        """New bases of the `parameters`, all of one shape, for the gradients `matrices`; their moments follow."""
        states = [self.state[p] for p in parameters]
        carried = projector_of(group).refresh(states, matrices)
        for state, sides in zip(states, carried, strict=True):
            if group["moments"] == "permute":
                for dim, source, kept in sides:
                    self.rule.take(state, dim, source, kept)
            elif group["moments"] == "reset":
                self.rule.forget(state)

    def _due(self, group: Group, count: int) -> bool:
        return self._since_refresh(group, count) == 1

    def _since_refresh(self, group: Group, count: int) -> int:
        """Steps with the present basis, this one counted."""
        gap = group["update_proj_gap"]
        if not self.counts_from_one:
            return (count - 1) % gap + 1
        return count if count < gap else count % gap + 1

    # ------------------------------------------------------------------------------------------------- refusing

    def name_of(self, parameter: Tensor) -> str:
        """Its name, if the optimizer was given named parameters, and its shape."""
        for group in self.param_groups:
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
                if p is parameter:
                    return f"{name} {tuple(p.shape)}"
        return f"a parameter of shape {tuple(parameter.shape)}"

    def _check(self, group: Group) -> None:
        self.rule.check(group)
        for name, choices in (("moments", MOMENTS), ("state_dtype", STATE_DTYPES)):
            if group[name] not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, but it is {group[name]!r}.", field=name)
        if group["rank"] is None:
            return
        projector = projector_of(group)
        if not isinstance(group["update_proj_gap"], int) or group["update_proj_gap"] < 1:
            gap = group["update_proj_gap"]
            raise UserError(f"update_proj_gap must be an integer of at least 1, but it is {gap!r}.", "update_proj_gap")
        if group["moments"] == "permute" and projector.basis == "svd":
            raise UserError(
                "moments='permute' needs a basis whose vectors can be told: dct2, dct3 or random.", "moments"
            )
        if group["error_feedback"] is not None:
            Feedback(group["error_feedback"])
        for p in group["params"]:
            if p.dim() < 2:
                raise UserError(
                    f"{self.name_of(p)} has no second dimension to project: put it in a parameter group without rank."
                )
            if is_sharded(p):
                raise UserError(
                    f"{self.name_of(p)} is sharded, and a subspace needs the whole gradient of a matrix on one rank: "
                    "train with DistributedDataParallel."
                )
        small = [p for p in group["params"] if min(_flat(p).shape) < projector.rank]
        if small:
            warnings.warn(
                f"rank {projector.rank} is more than the smaller side of {len(small)} matrices, the first is "
                f"{self.name_of(small[0])}: these keep their full rank.",
                stacklevel=2,
            )

    def _refuse_broken(self, work: Sequence[tuple[Group, list[Tensor], int]]) -> None:
        """Sparse gradients anywhere, and broken ones where a basis would be taken of them."""
        due: dict[torch.device, list[Tensor]] = {}
        for group, parameters, count in work:
            for p in parameters:
                if p.grad is not None and p.grad.is_sparse:
                    raise UserError(
                        f"the gradient of {self.name_of(p)} is sparse, which no subspace can be taken of: make its "
                        "embedding with sparse=False."
                    )
            if group["rank"] is not None and self._due(group, count):
                due.setdefault(parameters[0].device, []).extend(parameters)
        for parameters in due.values():
            # a sum is finite only where its terms are; half precision is summed in float32
            finite = torch.stack([_gradient(p).sum(dtype=result_dtype(p)) for p in parameters]).isfinite()
            if not bool(finite.all()):
                first = parameters[finite.tolist().index(False)]
                raise UserError(
                    f"the gradient of {self.name_of(first)} holds NaN or infinite entries, so that no subspace can be "
                    "taken of it: lower the learning rate, clip the gradients or leave out this step."
                )

    # ------------------------------------------------------------------------------------------------- resuming

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`, but every tensor stays in the dtype in which it was saved.

        Raises:
            UserError: the state belongs to another rank, basis or kind of projection.
        """
        for number, (saved, own) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            for name in _OF_THE_STATE:
                if saved.get(name) != own[name]:
                    raise UserError(
                        f"parameter group {number} was saved with {name}={saved.get(name)!r}, this optimizer has "
                        f"{own[name]!r}: build it as before, or start without the saved state.",
                        field=name,
                    )
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            own = self.state[parameters[index]]
            for key, value in values.items():
                if isinstance(value, Tensor) and own[key].dtype != value.dtype:
                    own[key] = value.to(own[key].device, copy=True)


def projector_of(group: Group) -> Projector:
    names = ("rank", "basis", "proj_type", "select_norm", "evaluation", "svd_method", "seed")
    return Projector(**{name: group[name] for name in names})


def _decay(weights: list[Tensor], rates: list[Any], group: Group) -> None:
    if group["weight_decay"] != 0:
        torch._foreach_mul_(weights, [1 - group["weight_decay"] * rate for rate in rates])


def _dtype(group: Group, parameter: Tensor) -> torch.dtype:
    return parameter.dtype if group["state_dtype"] == "weight" else result_dtype(parameter)


def _flat(t: Tensor) -> Tensor:
    """As a matrix (out, rest)."""
    return t.flatten(1) if t.dim() > 2 else t


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
