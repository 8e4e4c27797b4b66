"""Where gradients live: local shards, the process groups that complete their sums, one all_reduce for them all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "all_reduce_rows",
    "draw_alike",
    "full_shapes",
    "in_many_processes",
    "is_dtensor",
    "local_shard",
    "shards_one_of",
    "summing_groups",
    "table_device",
    "without_partial",
]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor: the parameters of FSDP2, HSDP and tensor parallelism."""
    if type(tensor) in (Tensor, torch.nn.Parameter):  # asked several times for each parameter in each step
        return False
    module = sys.modules.get("torch.distributed.tensor")  # if nothing has imported it, there can be no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The part of a tensor that this rank stores, sharing its memory; any other tensor as it is.

    Args:
        tensor: A DTensor or an ordinary tensor.
        like: A DTensor, usually the parameter, whose placements the part has to match. A gradient can have others:
            under tensor parallelism an embedding is sharded, its gradient replicated.

    Returns:
        An ordinary tensor.
    """
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    if like is not None and is_dtensor(like) and dtensor.placements != like.placements:  # type: ignore[attr-defined]
        dtensor = dtensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return _finished(dtensor.to_local())


def without_partial(tensor: Tensor) -> Tensor:
    """The same DTensor with every pending (partial) sum carried out; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    dtensor: Any = tensor
    if not any(placement.is_partial() for placement in dtensor.placements):
        return tensor
    placements = [Replicate() if placement.is_partial() else placement for placement in dtensor.placements]
    return dtensor.redistribute(dtensor.device_mesh, placements)


def shards_one_of(placement: Any, dims: Sequence[int]) -> bool:
    """Whether a DTensor's placement divides one of these dimensions of the tensor."""
    return not (placement.is_replicate() or placement.is_partial()) and placement.dim in dims


def summing_groups(tensor: Tensor, kept: Sequence[int] = ()) -> tuple[ProcessGroup, ...]:
    """The process groups over which sums of the local shard add up to sums of the whole tensor.

    One per mesh dimension over which the tensor is sharded; none for an ordinary tensor. A tensor that is sharded
    over two dimensions is summed over one, then over the other.

    Args:
        tensor: Any tensor.
        kept: Dimensions of the tensor over which is not summed: each of their indices has a sum of its own.
    """
    if not is_dtensor(tensor):
        return ()
    dtensor: Any = tensor
    mesh = dtensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(dtensor.placements)
        if not (placement.is_replicate() or placement.is_partial())
        and mesh.size(dim) > 1
        and not shards_one_of(placement, kept)
    )


def table_device(tensor: Tensor) -> torch.device:
    """The device for a table of this tensor's sums: where its groups communicate, and where float64 exists."""
    if is_dtensor(tensor):  # offloaded shards lie on the CPU, which NCCL cannot reduce
        return torch.device(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def all_reduce_rows(table: Tensor, groups: Sequence[Sequence[ProcessGroup]]) -> Tensor:
    """Sum each row of a table over its process groups, with one all_reduce per group for all its rows.

    All ranks of a group must call this with the same rows for that group, in the same order.

    Args:
        table: float64[P, k], one row of local sums per parameter.
        groups: For each row the groups to sum over; none leaves it as it is.

    Returns:
        The table, float64[P, k]; changed in place.
    """
    rows_of: dict[str, list[int]] = {}
    group_of: dict[str, ProcessGroup] = {}
    for row, row_groups in enumerate(groups):
        for group in row_groups:
            group_of[group.group_name] = group
            rows_of.setdefault(group.group_name, []).append(row)
    for name, rows in rows_of.items():
        part = table[rows]
        dist.all_reduce(part, group=group_of[name])
        table[rows] = part
    return table


def full_shapes(parameters: Iterable[Tensor]) -> list[torch.Size]:
    """The shapes of the whole parameters, also where an engine has left a slice or an empty placeholder of them.

    Args:
        parameters: A model's parameters, as DeepSpeed ZeRO-3 (``zero.Init``), FSDP1 or FSDP2 may have changed them.

    Returns:
        One shape per parameter; a parameter that is whole has its own.
    """
    parameters = list(parameters)
    homes = {}
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        from hf_sai.distributed.fsdp1 import find_homes

        homes = find_homes()
    return [torch.Size(homes[id(p)].shape if id(p) in homes else getattr(p, "ds_shape", p.shape)) for p in parameters]


def in_many_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def draw_alike(seed: int, device: torch.device) -> Iterator[None]:
    """The same random numbers on all ranks, whatever their own random states, which are left as they were.

    Args:
        seed: The same on all ranks.
        device: Where numbers will be drawn.
    """
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if on_cpu:
            torch.default_generator.manual_seed(seed)
        else:  # torch.manual_seed would seed all devices, and only this one is restored
            module = getattr(torch, device.type)
            with module.device(device):
                module.manual_seed(seed)
        yield


def _finished(tensor: Tensor) -> Tensor:
    """The tensor after the asynchronous collective that produces it, if there is one."""
    return tensor.wait() if type(tensor).__name__ == "AsyncCollectiveTensor" else tensor  # type: ignore[attr-defined]
