"""Tensors of a distributed run: FSDP2's shards read and written whole, and values as rank 0 has them.

Under `torch.distributed.fsdp.fully_shard` parameters, gradients and optimizer state are DTensors outside the forward
and backward pass; buffers stay whole. Plain tensors go through all of these functions unchanged and uncopied.

| function | communicates |
|---|---|
| `whole`, `gather`, `put_` | if sharded: call them on every rank, in the same order |
| `from_rank0`, `averaged` | if there are several ranks: likewise |
| `local`, `along`, `positions`, `write_` | never |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from loratlas.errors import UserError

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(t: Any) -> TypeGuard[DTensor]:
    """Whether `t` is a DTensor, of which a rank may hold only a part."""
    return dist.is_available() and isinstance(t, DTensor)


def several_ranks() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_cast(parameter: Tensor, kept: Tensor) -> None:
    """Raise `UserError` if a forward sees `parameter` in another dtype than `kept`, a buffer that belongs to it."""
    if parameter.dtype != kept.dtype:
        raise UserError(
            f"the adapter's parameters reach the forward in {parameter.dtype} and its fixed tensors in {kept.dtype}, "
            "so that nothing is left of their difference: under FSDP2 leave MixedPrecisionPolicy.param_dtype unset "
            "(mixed_precision: no) and load the base model in bfloat16, which leaves the adapter in float32."
        )


def local(t: Tensor) -> Tensor:
    """This rank's part of `t`, detached, in the same memory; `t` itself if it is not sharded."""
    return t.to_local().detach() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All of `t` in a new plain tensor; `t` itself if it is not sharded."""
    return gather([local(t)], [t])[0]


def gather(parts: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The whole tensors whose parts on this rank are `parts`; each is laid out as its counterpart in `like`.

    Everything that is sharded by rows over the same ranks, which is how `fully_shard` does it, travels in one
    collective.
    """
    result = list(parts)
    by_rows: dict[tuple[DeviceMesh, int, torch.dtype], list[int]] = {}
    for i, t in enumerate(like):
        if is_sharded(t):
            mesh = t.device_mesh
            if result[i].device.type != mesh.device_type:
                result[i] = result[i].to(mesh.device_type)  # FSDP2 offloads to the CPU; the ranks meet on the GPU
            axes = [axis for axis, placement in enumerate(t.placements) if not placement.is_replicate()]
            if len(axes) == 1 and t.placements[axes[0]] == Shard(0):
                by_rows.setdefault((mesh, axes[0], result[i].dtype), []).append(i)
            else:
                layout: Any = {"shape": t.shape, "stride": t.stride(), "run_check": False}
                result[i] = DTensor.from_local(result[i], mesh, t.placements, **layout).full_tensor()
    for (mesh, axis, _), members in by_rows.items():
        rows = _gather_rows([result[i] for i in members], [like[i].shape for i in members], mesh, axis)
        for i, t in zip(members, rows, strict=True):
            result[i] = t
    return result


def _gather_rows(parts: list[Tensor], shapes: list[torch.Size], mesh: DeviceMesh, axis: int) -> list[Tensor]:
    """One all-gather. Shards are cut as by `torch.chunk`: the last ranks may hold less than a full one or nothing, so
    each is sent in the room of a full one, and what then lies beyond the last row is dropped."""
    ranks = mesh.size(axis)
    rooms = [-(-shape[0] // ranks) * shape[1:].numel() for shape in shapes]
    sent = parts[0].new_zeros(sum(rooms))
    for room, part in zip(sent.split(rooms), parts, strict=True):
        room[: part.numel()].copy_(part.reshape(-1))
    received = sent.new_empty(ranks, len(sent))
    dist.all_gather(list(received.unbind()), sent, group=mesh.get_group(axis))
    blocks = received.split(rooms, dim=1)
    return [block.reshape(-1, *shape[1:])[: shape[0]] for block, shape in zip(blocks, shapes, strict=True)]


def write_(t: Tensor, value: Tensor) -> None:
    """Write the whole `value`, which every rank has, over `t`; in place, so optimizers and DDP buckets stay valid."""
    if is_sharded(t):
        local(t).copy_(_spread(value, t.device_mesh, t.placements))
    else:
        t.detach().copy_(value)


def put_(t: Tensor, dim: int, index: Tensor, slices: Tensor) -> None:
    """Write whole `slices` over those that `index` (int64, (k,)) names along `dim` of `t`, in place."""
    value = whole(t.detach())
    value.index_copy_(dim, index, slices.to(value))
    if is_sharded(t):
        write_(t, value)


def along(t: Tensor, dim: int, vector: Tensor) -> Tensor:
    """The piece of `vector`, which has an entry for every slice along `dim` of `t`, that belongs to `local(t)`."""
    if is_sharded(t):
        placements = [Shard(0) if placement.is_shard(dim) else Replicate() for placement in t.placements]
        return _spread(vector, t.device_mesh, placements).to(local(t).device)
    return vector


def positions(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """Where in `local(t)` the slices `index` along `dim` of `t` lie; those that other ranks hold are left out."""
    if is_sharded(t):
        mask = torch.zeros(t.shape[dim], dtype=torch.bool, device=index.device).index_fill_(0, index, True)
        return along(t, dim, mask).nonzero().flatten()
    return index.to(t.device)


def from_rank0(t: Tensor) -> Tensor:
    """`t` as rank 0 has it, perhaps of another shape (never another number of dimensions); `t` itself on one rank."""
    if not several_ranks():
        return t
    value = t.detach().clone(memory_format=torch.contiguous_format)
    if t.dim():
        shape = torch.tensor(t.shape, device=t.device)
        dist.broadcast(shape, src=0)
        if shape.tolist() != list(t.shape):
            value = t.new_empty(shape.tolist())
    dist.broadcast(value, src=0)
    return value


def averaged(t: Tensor) -> Tensor:
    """The mean of `t` over all ranks, the same bits on each; `t` itself on one rank."""
    if not several_ranks():
        return t
    total = t.detach().clone()
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def _spread(value: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """This rank's part of a `value` that every rank has."""
    everywhere = DTensor.from_local(value.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()
