"""Gradients of unit size: every row, or every tensor as a whole, divided by its root-mean-square before the momentum.

Reference: the column-wise normalised gradients of SCALE, "A Minimalist Optimizer Design for LLM Pretraining",
arXiv 2506.16659 (the columns there are the rows of ``nn.Linear.weight`` here: the weights of one output).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.sharding import is_dtensor, local_shard, summing_groups, table_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["NORMALIZED", "normalize_gradients_"]

#: What ``normalize_gradient`` can be, beside None.
NORMALIZED = ("rows", "tensor")


@torch.no_grad()
def normalize_gradients_(params: Iterable[Tensor], how: str) -> None:
    """Divide the gradients by their root-mean-squares, in place; zeros stay zeros.

    A row is all that belongs to one index of the first dimension: the weights of one output of a linear layer or a
    convolution, the vector of one token. A tensor of one dimension or none is normalised as a whole.

    Rows of sharded parameters (DTensor) are whole on their rank wherever the first dimension is the sharded one, as
    under FSDP2. What is not whole there, vectors above all, costs one all_reduce per process group for all gradients
    together, so that all ranks must call this with the same parameters in the same order.

    Args:
        params: Parameters of which those with a gradient count.
        how: ``"rows"`` or ``"tensor"``.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> p.grad = torch.tensor([[3.0, -3.0], [0.0, 0.0]])
        >>> normalize_gradients_([p], "rows")
        >>> p.grad
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    params = [p for p in params if p.grad is not None and p.numel() > 0]
    by_row = [how == "rows" and p.ndim > 1 for p in params]
    gradients = [_as_placed(p) for p in params]
    sums = [_sums_of_squares(g, rows) for g, rows in zip(gradients, by_row, strict=True)]
    groups = [
        () if rows and _keeps_rows_whole(p) else summing_groups(p) for p, rows in zip(params, by_row, strict=True)
    ]
    _all_reduce(sums, groups, params)
    for p, gradient, total, rows in zip(params, gradients, sums, by_row, strict=True):
        length = p.numel() / p.shape[0] if rows else p.numel()
        factor = torch.where(total > 0, total.rsqrt() * math.sqrt(length), total)
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)) if rows else factor)


def _as_placed(p: Tensor) -> Tensor:
    """The local part of a parameter's gradient, which gets the parameter's placements if it has others."""
    assert p.grad is not None
    if is_dtensor(p) and p.grad.placements != p.placements:  # type: ignore[attr-defined]
        p.grad = p.grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return local_shard(p.grad)


def _sums_of_squares(gradient: Tensor, rows: bool) -> Tensor:
    """float32 or better: one per row, or one of the whole tensor."""
    dims = list(range(1, gradient.ndim)) if rows else None
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dim=dims, dtype=dtype).square()


def _keeps_rows_whole(p: Any) -> bool:
    """Whether each row lies on one rank."""
    return not is_dtensor(p) or all(
        placement.dim == 0 for placement in p.placements if not (placement.is_replicate() or placement.is_partial())
    )


def _all_reduce(sums: Sequence[Tensor], groups: Sequence[Sequence[ProcessGroup]], params: Sequence[Tensor]) -> None:
    """Add up each parameter's sums over its process groups, in place, with one all_reduce per group."""
    shared: dict[str, tuple[ProcessGroup, torch.device, list[Tensor]]] = {}
    for total, tensor_groups, p in zip(sums, groups, params, strict=True):
        for group in tensor_groups:
            shared.setdefault(group.group_name, (group, table_device(p), []))[2].append(total)
    for group, device, totals in shared.values():
        flat = torch.cat([total.flatten() for total in totals]).to(device)
        dist.all_reduce(flat, group=group)
        for total, part in zip(totals, flat.split([total.numel() for total in totals]), strict=True):
            total.copy_(part.view_as(total))
