"""Models in a distributed run: one start on all ranks, the adapter's tensors whole, and what cannot work refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from loratlas.engine.layer import AtlasLayer
from loratlas.engine.model import atlas_layers
from loratlas.engine.sharded import from_rank0, is_sharded, several_ranks, whole
from loratlas.errors import UserError


def whole_state_dict(model: nn.Module, save_embedding_layers: bool | str = "auto") -> dict[str, Tensor]:
    """What `save_pretrained` writes of a sharded PEFT model, as whole tensors. The base model is not gathered.

        state = whole_state_dict(model)                                     # on every rank
        model.save_pretrained("out", state_dict=state, is_main_process=rank == 0)

    Args:
        model: the `PeftModel`, with any number of adapters of any PEFT method.
        save_embedding_layers: as `save_pretrained` gets it.

    Returns:
        {name as in model.state_dict(): tensor}. A model that is not sharded is fine; its tensors are not copied.
    """
    peft_model: Any = model
    state = model.state_dict()
    # PEFT itself says which tensors an adapter's file holds; it is shown stand-ins, so the base stays in its shards
    stand_ins = {name: torch.empty(0) for name in state}
    chosen: set[int] = set()
    for adapter in peft_model.peft_config:
        picked = get_peft_model_state_dict(
            peft_model,
            stand_ins,
            adapter,
            save_embedding_layers=save_embedding_layers,  # type: ignore[arg-type]
        )
        chosen |= {id(tensor) for tensor in picked.values()}
    return {name: whole(state[name]) for name, stand_in in stand_ins.items() if id(stand_in) in chosen}


@torch.no_grad()
def same_start(model: nn.Module) -> None:
    """Give the adapters on every rank the values that they have on rank 0. Call it on every rank.

    An SVD is not the same on all machines: signs, rounding and the order of equal singular values differ with hardware
    and libraries. `attach` calls this. With machines of several kinds, call it yourself between `get_peft_model` and
    `fully_shard`: afterwards no rank has whole parameters to give, and `attach` can only compare.

    Raises:
        UserError: on every rank, if a layer's rank r differs, or if the ranks started differently and its parameters
            are sharded already.
    """
    found = [(path, layer, adapter) for path, layer in atlas_layers(model) for adapter in layer.adapters()]
    if not several_ranks() or not found:
        return
    shared = {id(t): t for _, layer, _ in found for name in layer.method.shared for t in layer.store(name).values()}
    for tensor in shared.values():
        tensor.copy_(from_rank0(tensor.to(_place(found[0][1]))))
    alike = [_take_from_rank0(layer, adapter) for _, layer, adapter in found]
    first = torch.tensor(alike.index(False) if False in alike else len(alike), device=_place(found[0][1]))
    dist.all_reduce(first, op=dist.ReduceOp.MIN)  # all ranks go on, or all stop
    if int(first) == len(found):
        return
    path, layer, _ = found[int(first)]
    if _has_shards(layer):
        raise UserError(
            f"module {path} started differently on some ranks and is sharded already: call "
            "loratlas.engine.distributed.same_start(model) between get_peft_model and fully_shard."
        )
    raise UserError(f"module {path} has another rank r on some processes: set its rank in rank_pattern.")


def _take_from_rank0(layer: AtlasLayer, adapter: str) -> bool:
    """False if this rank differs from rank 0 and cannot follow it."""
    sharded, place = _has_shards(layer), _place(layer)
    changed, alike = False, True
    for name in (*layer.method.params, *layer.buffer_names()):
        store = layer.store(name)
        if adapter not in store or is_sharded(store[adapter]):
            continue
        own = store[adapter].detach()
        theirs = from_rank0(own.to(place)).to(own.device)
        if torch.equal(theirs, own):
            continue
        changed = True
        if not sharded and theirs.shape == own.shape:
            own.copy_(theirs)
        elif not sharded and name in layer.method.growing:
            store[adapter] = theirs
        else:
            alike = False
    if changed and alike:
        layer.derive(adapter)
    return alike


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _has_shards(layer: AtlasLayer) -> bool:
    return any(is_sharded(p) for name in layer.method.params for p in layer.store(name).values())


def _place(layer: AtlasLayer) -> torch.device:
    """Where the ranks meet: buffers that are kept in host memory are no place for NCCL."""
    weight: Tensor = layer.weight
    return torch.empty(0, device=weight.device_mesh.device_type).device if is_sharded(weight) else weight.device


# --------------------------------------------------------------------------------------------------------- refusals


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper, or the one given.

    Raises:
        UserError: it is DeepSpeed's, or no torch optimizer.
    """
    inner = optimizer
    # accelerate's wrapper calls itself an Optimizer, but has no hooks
    while isinstance(inner, AcceleratedOptimizer) and not isinstance(inner, DeepSpeedOptimizerWrapper):
        inner = inner.optimizer
    if isinstance(inner, DeepSpeedOptimizerWrapper) or type(inner).__module__.partition(".")[0] == "deepspeed":
        raise UserError(
            "DeepSpeed keeps parameters, gradients and moments in partitions of its own, where methods that act while "
            "training cannot reach them: train with DistributedDataParallel or FSDP2 instead."
        )
    if not isinstance(inner, Optimizer):
        raise UserError(f"attach needs a torch.optim.Optimizer, but got {type(inner).__name__}.")
    return inner


def refuse_flat_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """FSDP1 concatenates and cuts parameters regardless of rows and columns.

    Raises:
        UserError: the model is wrapped in FullyShardedDataParallel, or an adapter's tensors are not in their shape.
    """
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

    flat = (
        any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        or any(isinstance(p, FlatParameter) for group in optimizer.param_groups for p in group["params"])
        or any(_is_flat(layer, adapter) for _, layer in atlas_layers(model) for adapter in layer.adapters())
    )
    if flat:
        raise UserError(
            "FSDP1 (FullyShardedDataParallel) flattens parameters, so that the adapter's rows and columns cannot be "
            "found: use FSDP2, that is torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's config."
        )


def _is_flat(layer: AtlasLayer, adapter: str) -> bool:
    """Also when only the inside of an FSDP1 model is at hand: its parameters then lie there in one dimension."""
    n_out, n_in = layer.op.shape
    shapes = layer.method.shapes(layer.atlas_config[adapter], layer.atlas_r[adapter], n_in, n_out)
    tensors = ((shapes[name], layer.store(name)) for name in layer.method.params if name in shapes)
    return any(tuple(store[adapter].shape) != shape for shape, store in tensors)
