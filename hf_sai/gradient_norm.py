"""Gradients of unit size: divided by root-mean-squares of rows, of the whole or running ones, before the momentum.

References: the column-wise normalised gradients of SCALE, "A Minimalist Optimizer Design for LLM Pretraining",
arXiv 2506.16659 (the columns there are the rows of ``nn.Linear.weight`` here: the weights of one output); the factored
second moment of Adafactor, arXiv 1804.04235, equation 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.sharding import is_dtensor, local_shard, shards_one_of, summing_groups, table_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MEAN_SQUARES", "NORMALIZED", "allocate_mean_squares", "normalize_gradients_"]

#: What ``normalize_gradient`` can be, beside None.
NORMALIZED = ("rows", "tensor", "factored")

#: State of ``"factored"``, each float32 whatever the parameter's dtype; a vector has the first only.
MEAN_SQUARES = ("mean_square", "row_mean_square", "column_mean_square")

#: So many squares of elements fit into the cache of a CPU's core.
_PIECE = 1 << 18

#: How much a running mean keeps from step to step: AdamW's beta2.
_KEPT = 0.999


@torch.no_grad()
def normalize_gradients_(
    params: Iterable[Tensor], how: str, state: Mapping[Tensor, dict[str, Any]] | None = None
) -> None:
    """Divide the gradients by root-mean-squares, in place; zeros stay zeros.

    ``"rows"`` gives every row root-mean-square 1, ``"tensor"`` the whole. A row is all that belongs to one index of the
    first dimension: the weights of one output of a linear layer or a convolution, the vector of one token. A tensor of
    one dimension or none is normalised as a whole.

    ``"factored"`` divides element ij by the root of ``r_i c_j / w``, where r, c and w are running mean squares (the
    last thousand steps count most) of the rows, of the columns (all that belongs to one index of the other dimensions)
    and of the whole: Adafactor's estimate of AdamW's second moment. A tensor of one dimension or none has a running
    mean square of each element, as in AdamW.

    Means of sharded parameters (DTensor) that are not whole on their rank cost one all_reduce per process group for
    all gradients together: under FSDP2 the columns', the vectors' and the whole's. All ranks must call this with the
    same parameters in the same order.

    Args:
        params: Parameters of which those with a gradient count.
        how: One of ``NORMALIZED``.
        state: Parameter -> its state, with what :func:`allocate_mean_squares` wrote; only ``"factored"`` uses it.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> p.grad = torch.tensor([[3.0, -3.0], [0.0, 0.0]])
        >>> normalize_gradients_([p], "rows")
        >>> p.grad.round(decimals=4)
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    params = [p for p in params if p.grad is not None and p.numel() > 0]
    gradients = [_as_placed(p) for p in params]
    means = [
        [_sum_of_squares(g, kept) for kept in _kept_dimensions(p, how)] for p, g in zip(params, gradients, strict=True)
    ]
    _all_reduce(
        (mean, summing_groups(p, kept), table_device(p))
        for p, of_p in zip(params, means, strict=True)
        for mean, kept in zip(of_p, _kept_dimensions(p, how), strict=True)
    )
    for p, gradient, of_p in zip(params, gradients, means, strict=True):
        for mean, kept in zip(of_p, _kept_dimensions(p, how), strict=True):
            mean.mul_(math.prod(p.shape[d] for d in kept) / p.numel())
        if how == "factored":
            assert state is not None
            of_p = _running_means(state[p], of_p)
        first, *factors = of_p
        if factors:
            rows, columns = map(_inverse_root, factors)
            gradient.mul_(rows.mul_(first.sqrt())).mul_(columns)
        else:
            gradient.mul_(_inverse_root(first))


def allocate_mean_squares(state: dict[str, Any], p: Tensor, how: str | None) -> None:
    """Give a parameter's state the running means of ``"factored"``, all 0, if it needs them and has none.

    Args:
        state: ``MEAN_SQUARES`` are written, with as many dimensions as the parameter and of length 1 in those over
            which is averaged, and ``averaged_steps``, an int. Of a sharded parameter they are DTensors, sharded as it
            is in the dimensions that are left.
        p: The parameter.
        how: ``normalize_gradient`` of its group.
    """
    if how != "factored" or "averaged_steps" in state:
        return
    state["averaged_steps"] = 0
    for name, kept in zip(MEAN_SQUARES, _kept_dimensions(p, how), strict=False):
        shapes = [[t.shape[d] if d in kept else 1 for d in range(p.ndim)] for t in (p, local_shard(p))]
        mean: Tensor = torch.zeros(shapes[1], dtype=torch.float32, device=p.device)
        if is_dtensor(p):
            from torch.distributed.tensor import DTensor, Replicate

            dtensor: Any = p
            placements = [pl if shards_one_of(pl, kept) else Replicate() for pl in dtensor.placements]
            whole = torch.empty(shapes[0], device="meta")
            layout: dict[str, Any] = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
            mean = DTensor.from_local(mean, dtensor.device_mesh, placements, **layout)
        state[name] = mean


def _kept_dimensions(p: Tensor, how: str) -> tuple[tuple[int, ...], ...]:
    """For each mean square the dimensions over which is not averaged; those of ``MEAN_SQUARES`` in their order."""
    dims = tuple(range(p.ndim))
    if p.ndim < 2:
        return (dims,) if how == "factored" else ((),)
    return {"rows": (dims[:1],), "tensor": ((),), "factored": ((), dims[:1], dims[1:])}[how]


def _as_placed(p: Tensor) -> Tensor:
    """The local part of a parameter's gradient, which gets the parameter's placements if it has others."""
    assert p.grad is not None
    if is_dtensor(p) and p.grad.placements != p.placements:  # type: ignore[attr-defined]
        p.grad = p.grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return local_shard(p.grad)


def _sum_of_squares(gradient: Tensor, kept: tuple[int, ...]) -> Tensor:
    """float32 or better, over all dimensions but those that are kept, which stay with length 1."""
    dims = [d for d in range(gradient.ndim) if d not in kept]
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if not dims:
        return gradient.to(dtype).square()
    if (
        dims == [0] and gradient.is_cpu and gradient.numel() > 0
    ):  # vector_norm over columns takes 20 times as long there
        pieces = gradient.split(max(1, _PIECE // gradient[0].numel()))
        return torch.stack([piece.to(dtype).square().sum(0, keepdim=True) for piece in pieces]).sum(0)
    return torch.linalg.vector_norm(gradient, dim=dims, keepdim=True, dtype=dtype).square()


def _running_means(state: dict[str, Any], means: Sequence[Tensor]) -> list[Tensor]:
    """Add to the running means; returns them without the share that their start at 0 has in them."""
    state["averaged_steps"] += 1
    running = [local_shard(state[name]) for name in MEAN_SQUARES[: len(means)]]
    for average, mean in zip(running, means, strict=True):
        average.lerp_(mean.to(average.dtype), 1 - _KEPT)
    return [average / (1 - _KEPT ** state["averaged_steps"]) for average in running]


def _inverse_root(mean: Tensor) -> Tensor:
    return torch.where(mean > 0, mean.rsqrt(), mean)


def _all_reduce(sums: Iterable[tuple[Tensor, Sequence[ProcessGroup], torch.device]]) -> None:
    """Add up each sum over its process groups, in place, with one all_reduce per group (on the device it wants)."""
    shared: dict[str, tuple[ProcessGroup, torch.device, list[Tensor]]] = {}
    for total, groups, device in sums:
        for group in groups:
            shared.setdefault(group.group_name, (group, device, []))[2].append(total)
    for group, device, totals in shared.values():
        flat = torch.cat([total.flatten() for total in totals]).to(device)
        dist.all_reduce(flat, group=group)
        for total, part in zip(totals, flat.split([total.numel() for total in totals]), strict=True):
            total.copy_(part.view_as(total))
