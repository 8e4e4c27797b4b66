"""DTensor: the parameters of FSDP2, HSDP and tensor parallelism, of which each process holds a shard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sai.distributed.copies import shared_out
from hf_sai.distributed.exchange import exchanges
from hf_sai.optim.layout import ORDINARY, Copies, Part, Sharing, register_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Shard", "is_dtensor"]


def is_dtensor(p: Tensor) -> bool:
    """Whether this is a DTensor."""
    if type(p) in ORDINARY:  # asked several times for each parameter in each step
        return False
    module = sys.modules.get("torch.distributed.tensor")  # if nothing has imported it, there can be no DTensor
    return module is not None and isinstance(p, module.DTensor)


@register_part
class Shard(Part):
    """This rank's shard of a DTensor, uneven or empty ones included; the gradient gets the parameter's placements.

    A gradient can have others: under tensor parallelism an embedding is sharded, its gradient replicated.
    """

    __slots__ = ("_dtensor",)

    kind = "sharded parameters (DTensor: FSDP2, tensor parallelism)"
    parted = True

    recognises = staticmethod(is_dtensor)

    @classmethod
    def local(cls, tensor: Tensor) -> Tensor | None:
        return _local(tensor) if is_dtensor(tensor) else None

    def __init__(self, p: Tensor, group: dict[str, Any], state: Any, number: int = 0) -> None:
        super().__init__(p, group, state, number)
        self._dtensor: Any = p
        self.param = _local(p)
        if p.grad is not None:
            self.grad = _local(p.grad, like=p)

    @classmethod
    def of_gradient(cls, gradient: Any, group: dict[str, Any]) -> Part:
        if any(placement.is_partial() for placement in gradient.placements):
            from torch.distributed.tensor import Replicate

            placements = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
            gradient = gradient.redistribute(gradient.device_mesh, placements)
        return super().of_gradient(gradient, group)

    def holders(self, kept: Sequence[int] = ()) -> tuple[ProcessGroup, ...]:
        """One group per mesh dimension over which the tensor is sharded, unless in a kept dimension.

        A tensor that is sharded over two dimensions is summed over one, then over the other.
        """
        mesh = self._dtensor.device_mesh
        return tuple(
            mesh.get_group(dim)
            for dim, placement in enumerate(self._dtensor.placements)
            if not (placement.is_replicate() or placement.is_partial())
            and mesh.size(dim) > 1
            and placement.dim not in kept
        )

    @classmethod
    def sharing(cls, parts: Sequence[Part]) -> Sequence[tuple[list[Part], Sharing]]:
        return exchanges(parts)

    @classmethod
    def copied(cls, parts: Sequence[Part]) -> Sequence[tuple[list[Part], Copies | None]]:
        """Replicas share the work where one mesh dimension counts them, as that of HSDP does."""

        def group_of(part: Any) -> ProcessGroup | None:
            mesh, placements = part._dtensor.device_mesh, part._dtensor.placements
            dims = [dim for dim, of in enumerate(placements) if of.is_replicate() and mesh.size(dim) > 1]
            return mesh.get_group(dims[0]) if len(dims) == 1 else None

        return shared_out(parts, group_of)

    @property
    def table_device(self) -> torch.device:
        # Offloaded shards lie on the CPU, which NCCL cannot reduce.
        return torch.device(self._dtensor.device_mesh.device_type)

    def lying(self, tensor: Tensor) -> Tensor:
        """A DTensor, sharded as the parameter is."""
        return self._as_dtensor(tensor, self._dtensor.placements, self.shape)

    def zeros(self, dtype: torch.dtype | None = None, kept: Sequence[int] | None = None) -> Tensor:
        """A DTensor, sharded as the parameter is in the dimensions that are kept."""
        if kept is None:
            return torch.zeros_like(self._dtensor, dtype=dtype)
        from torch.distributed.tensor import Replicate

        shard = super().zeros(dtype, kept)
        placements = [
            placement if not placement.is_replicate() and placement.dim in kept else Replicate()
            for placement in self._dtensor.placements
        ]
        return self._as_dtensor(shard, placements, [length if d in kept else 1 for d, length in enumerate(self.shape)])

    def _as_dtensor(self, shard: Tensor, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
        from torch.distributed.tensor import DTensor

        whole = torch.empty(shape, device="meta")
        layout: dict[str, Any] = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
        return DTensor.from_local(shard, self._dtensor.device_mesh, placements, **layout)


def _local(tensor: Any, like: Any = None) -> Tensor:
    """A DTensor's part on this rank, sharing its memory, with the placements of another."""
    if like is not None and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    shard = tensor.to_local()
    return shard.wait() if type(shard).__name__ == "AsyncCollectiveTensor" else shard
