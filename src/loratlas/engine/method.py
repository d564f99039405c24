"""The contract between a method and the engine.

A method is a small stateless class in one file. It names its tensors and says how they start and what they do to the
weight; the engine makes layers, models, PEFT registration, merging, saving, several adapters and exports out of that.

    class MyMethod(LowRankMethod):
        name = "my-method"
        params = ("A", "B")

        def shapes(self, cfg, r, n_in, n_out): return {"A": (r, n_in), "B": (n_out, r)}
        def init(self, t, weight): nn.init.kaiming_uniform_(t.A, a=5**0.5)
        def factors(self, t): return Factors(down=t.A, up=t.B * t.scaling)

Everything a method must remember is a tensor in `params` or `buffers`, so that checkpoints, device moves and resume
work by themselves. Weights are seen as one canonical (out, in) matrix whatever the layer kind (see `ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from loratlas.engine.factors import Factors, low_rank_branch

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    from loratlas.engine.layer import AtlasLayer
    from loratlas.engine.lifecycle import StepContext
    from loratlas.engine.ops import Op

RELATIVE_FISHER = (
    "relative_fisher"  # the statistic of two data sets; `relative_fisher` gathers it, `calibrate` the rest
)


class View:
    """One adapter's tensors on one layer, as a method sees them: `t.A`, `t.B`, ... and the facts around them.

    Attributes:
        cfg: the adapter's config.
        r: rank in this layer (after rank_pattern).
        scaling: the factor s of this layer.
        op: the layer kind's view of its weight; `op.shape` is the canonical (out, in).
        statistics: what `calibrate` gathered of this layer, by name; only during `init`, empty if nothing was.
        layer, adapter: where the tensors live; methods do not store anything on them.

    A tensor that the method declares but that `shapes` left out for this config reads as None.
    """

    def __init__(self, layer: AtlasLayer, adapter: str) -> None:
        self.layer = layer
        self.adapter = adapter
        self.cfg: Any = layer.atlas_config[adapter]
        self.r: int = layer.atlas_r[adapter]
        self.scaling: float = layer.atlas_scaling[adapter]
        self.op: Op = layer.op
        self.statistics: dict[str, Tensor] = layer.statistics

    def __getattr__(self, name: str) -> Any:
        store = self.layer.store(name)
        # BufferDict has no `get`
        return store[self.adapter] if self.adapter in store else None  # noqa: SIM401

    def shrink(self, r: int) -> None:
        """Make the tensors anew, all zeros, at the smaller rank r. Only in `init` of a method that chooses its rank."""
        self.layer.allocate(self.adapter, self.cfg, r, self.layer.atlas_alpha[self.adapter])
        self.r, self.scaling = r, self.layer.atlas_scaling[self.adapter]

    def grow(self, name: str, value: Tensor) -> None:
        """Replace a buffer by one of another shape. Parameters never change shape: optimizers hold them by identity."""
        if name not in self.layer.method.growing:
            raise AttributeError(f"{name} of {self.layer.method.name} is not declared in `growing`")
        self.layer.store(name)[self.adapter] = value


class Method:
    """Base of all weight-space methods; override what the method needs.

    Class attributes:
        name: slug in the catalogue; the PEFT type is ATLAS_<NAME>.
        kinds: layer kinds that are supported, of "linear", "conv1d", "conv2d", "embedding".
        params: trainable tensors; their names are the checkpoint names. `frozen` may take some out for a config.
        buffers: frozen tensors that travel with the adapter.
        growing: the buffers that may change shape while training.
        derived: tensors computed from the others by `derive`; never saved.
        shared: frozen tensors of which all layers of an adapter use one copy (see `make_shared`).
        undecayed: those of `params` that an optimizer's weight decay leaves alone, whatever group they are in.
        nested: the buffer () of how many of the first pairs are in use, where these are an adapter (see `nested`).
        chooses_rank: the start may `shrink` a layer's rank by a rule of the method; no reason to warn.
        additive: False for W' = f(W); then `merged` replaces `delta_weight`, and `output` may replace the forward.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    params: ClassVar[tuple[str, ...]] = ()
    buffers: ClassVar[tuple[str, ...]] = ()
    growing: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()
    nested: ClassVar[str] = ""
    chooses_rank: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    def scale(self, cfg: Any, r: int, alpha: float | None) -> float:
        """The scaling s of a layer: alpha / r, and 1 when no alpha is given."""
        return 1.0 if alpha is None else alpha / r

    def shapes(self, cfg: Any, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        """{tensor name: shape} of everything in `params` and `buffers` that this config uses."""
        raise NotImplementedError

    def rank_in(self, cfg: Any, tensors: dict[str, Tensor]) -> int | None:
        """Rank of a saved layer where its tensors say more than the config, which may be older; None: the config's."""
        return None

    def frozen(self, cfg: Any) -> tuple[str, ...]:
        """Names in `params` that this config does not train. What no config trains belongs into `buffers`."""
        return ()

    def ranks(self, cfg: Any, weights: Mapping[str, Callable[[], Tensor]]) -> dict[str, int]:
        """Ranks of single layers by a rule that looks at all of them, {module path: r}; others have the config's r.

        weights: the canonical weight of every layer that is about to be adapted and has no rank of its own in
        `rank_pattern`, by path.
        """
        return {}

    def dtypes(self) -> dict[str, torch.dtype]:
        """{buffer name: dtype} of the buffers that are not floating point."""
        return {}

    def on_host(self, cfg: Any) -> tuple[str, ...]:
        """Buffers that stay in CPU memory wherever the layer is (large and rarely read)."""
        return ()

    def gather(self, cfg: Any) -> tuple[str, ...]:
        """Statistics of the layer that `init` needs under this config (see `calibrate`); `t.statistics` has them."""
        return ()

    def order(
        self, cfg: Any, rows: int, per_step: int, total_steps: int, seed: int, lengths: Sequence[int] | None = None
    ) -> Sampler[int] | None:
        """The numbers of the `rows` training rows in the order in which optimizer steps use them, all steps in one go.

        For methods whose steps see different parts of the data; None: the usual shuffled epochs. per_step: rows of one
        step, of all its batches and ranks. lengths: of the rows, if those of a step shall have like ones. The result
        may depend on nothing but the arguments.
        """
        return None

    def make_shared(self, cfg: Any, sizes: Sequence[tuple[int, int, int]]) -> dict[str, Tensor]:
        """{name: tensor} of everything in `shared`, fp32 on the CPU, made once before the layers are.

        sizes: (r, in, out) of every layer that the adapter gets, in the order of the model. The result may depend on
        nothing but the arguments: other processes make it again.
        """
        raise NotImplementedError

    def drawn_again(self, cfg: Any) -> tuple[str, ...]:
        """Names in `shared` that an adapter's file leaves out; a fingerprint of each is saved and checked instead."""
        return ()

    def init(self, t: View, weight: Callable[[], Tensor]) -> int | None:
        """Give the tensors (all zeros) their start. `weight()` is the base weight, (out, in), fp32 or fp64.

        Returning an integer below `t.r` says that the layer has only that many useful pairs: the engine makes the
        tensors anew at that rank, warns, records it in `rank_pattern` and calls `init` again.
        """
        raise NotImplementedError

    def derive(self, t: View, weight: Callable[[], Tensor]) -> None:
        """Recompute the `derived` tensors; called after the start, after loading and by the method itself."""

    def delta(self, t: View, x: Tensor) -> Tensor:
        """Output of the adapter branch for layer input x; the dtype is that of x."""
        raise NotImplementedError

    def branch(self, t: View, x: Tensor, y: Tensor, dropped: Callable[[Tensor], Tensor]) -> Tensor:
        """What the adapter adds to the frozen layer's output y; only methods that read y or drop elsewhere override it.

        dropped: the config's dropout while training, else the identity.
        """
        return self.delta(t, dropped(x))

    def output(self, t: View, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """For W' = f(W): the layer's output by calls of `base` alone, the layer without this adapter.

        None where that is not possible; then W' is built and applied (see `transform`).
        """
        return None

    def whole(self, t: View, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor | None:
        """Optional: x W^T + b and the branch together, for a plain dense layer with the (out, in) weight W.

        For updates of full rank, which need more than thin products; those of thin factors have the fused op. None
        where it does not pay: then the layer goes on as if it were not there.
        """
        raise NotImplementedError

    def delta_weight(self, t: View) -> Tensor:
        """The readable formula: the update as one (out, in) matrix. Merging, exports and tests use it."""
        raise NotImplementedError

    def bias_delta(self, t: View) -> Tensor | None:
        """What the adapter adds to the layer's bias, (out,); None: nothing. The layer may have no bias of its own."""
        return None

    def merged(self, t: View, weight: Tensor) -> Tensor:
        """W' for the (out, in) weight W in fp32 or fp64."""
        return weight + self.delta_weight(t).to(weight.dtype)

    def bound(self, cfg: Any) -> bool:
        """Whether the update is a function of W, so that the adapter belongs to the base it was trained on."""
        return False

    def lora_factors(self, t: View) -> tuple[Tensor, Tensor] | None:
        """(down, up) with delta_weight = up @ down, if the method has such factors; exports are exact with them."""
        return None

    def export_rank(self, t: View, total_steps: int) -> int | None:
        """Largest rank that an exact plain LoRA of this layer can need after `total_steps` optimizer steps.

        None where there is no LoRA form. An additive method of no known rank can need all of min(out, in).
        """
        return min(t.op.shape) if self.additive else None

    # Called by `lifecycle` once an optimizer step with gradients complete (accumulated, all-reduced, unscaled), for
    # all layers at once so that a method can batch its arithmetic (torch._foreach_*). Under FSDP2 parameters, gradients
    # and optimizer state are sharded here, buffers are not: read with `sharded.whole` or `sharded.gather`, write with
    # `sharded.write_` or `sharded.put_`, on every rank in the same order.

    def begin(self, views: Sequence[View], ctx: StepContext) -> None:
        """Runs when training starts or goes on, before the first forward; ctx.step is the last step done, or 0."""

    def pace(self, views: Sequence[View], ctx: StepContext, scheduler: Any) -> None:
        """Runs when training starts, where the scheduler of the learning rate is known (see `phases`)."""

    def before_step(self, views: Sequence[View], ctx: StepContext) -> None:
        """Runs before the optimizer's step; the gradients are those the optimizer is about to use."""

    def after_step(self, views: Sequence[View], ctx: StepContext) -> None:
        """Runs after the optimizer's step; may rewrite parameters in place and treat optimizer state (`ctx`)."""

    def check_training(self, views: Sequence[View], ctx: StepContext) -> None:
        """Raise `UserError` if this run cannot work (no total_steps, an optimizer that does not fit)."""

    def extra_loss(self, views: Sequence[View]) -> Tensor:
        """A term added to the model's loss, where `adds_loss` says so."""
        raise NotImplementedError

    def adds_loss(self, cfg: Any) -> bool:
        """Whether `extra_loss` has anything to add under this config."""
        return self.overrides("extra_loss")

    @classmethod
    def overrides(cls, hook: str) -> bool:
        return getattr(cls, hook) is not getattr(Method, hook)

    @classmethod
    def has_lifecycle(cls) -> bool:
        """Whether `lifecycle.attach` has anything to do for this method."""
        hooks = ("begin", "before_step", "after_step", "extra_loss")
        return bool(cls.undecayed) or any(cls.overrides(hook) for hook in hooks)


class LowRankMethod(Method):
    """A method whose update is a product of thin factors: it only says which ones.

    `factors` gives the forward (through the fused op where the layer allows it), the merged weight and an exact export
    to a plain LoRA.
    """

    def factors(self, t: View) -> Factors:
        """The update of one layer in low-rank form."""
        raise NotImplementedError

    def exported(self, t: View) -> Factors:
        """What an export ships: `factors`, less what adds nothing. Here values may be looked at; no gradients."""
        return self.factors(t)

    def pair(self, t: View) -> tuple[nn.Parameter, nn.Parameter] | None:
        """(A (r, in), B (out, r)) where the update is s B A + what does not train, s = t.scaling; else None.

        Optimizers that work on low-rank pairs ask for it (see `pair_registry`).
        """
        return None

    def working(self, t: View) -> tuple[Tensor, Factors] | None:
        """A dense working weight (out, in) and the factors on top of it, if the method keeps one; else None.

        Must equal W plus `factors`; saves the forward the frozen part of the update.
        """
        return None

    def export_rank(self, t: View, total_steps: int) -> int | None:
        with torch.no_grad():
            return min(self.factors(t).joined()[0].shape[0], *t.op.shape)

    def lora_factors(self, t: View) -> tuple[Tensor, Tensor]:
        return self.exported(t).joined()

    def delta(self, t: View, x: Tensor) -> Tensor:
        return low_rank_branch(t.op, x, self.factors(t))

    def delta_weight(self, t: View) -> Tensor:
        down, up = self.factors(t).joined()
        return up @ down
