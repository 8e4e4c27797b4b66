"""Gradients of unit size: divided by root-mean-squares of rows, of the whole or running ones, before the momentum.

References: the column-wise normalised gradients of SCALE, "A Minimalist Optimizer Design for LLM Pretraining",
arXiv 2506.16659 (the columns there are the rows of ``nn.Linear.weight`` here: the weights of one output); the factored
second moment of Adafactor, arXiv 1804.04235, equation 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.distributed.sharding import is_dtensor, local_shard, shards_one_of, summing_groups, table_device
from hf_sai.kernels.compiled import compiled_module

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MEAN_SQUARES", "NORMALIZED", "allocate_mean_squares", "gradient_factors"]

#: What ``normalize_gradient`` can be, beside None.
NORMALIZED = ("rows", "tensor", "factored")

#: State of ``"factored"``, each float32 whatever the parameter's dtype; a vector has the first only.
MEAN_SQUARES = ("mean_square", "row_mean_square", "column_mean_square")

#: So many squares of elements fit into the cache of a CPU's core.
_PIECE = 1 << 18

#: How much a running mean keeps from step to step: AdamW's beta2.
_KEPT = 0.999


@torch.no_grad()
def gradient_factors(
    params: Iterable[Tensor],
    how: str,
    state: Mapping[Tensor, dict[str, Any]] | None = None,
    *,
    compiled: bool = False,
) -> dict[Tensor, tuple[Tensor, ...]]:
    """What to multiply gradients by to divide them by root-mean-squares; zeros stay zeros.

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
        state: Parameter -> its state, with what :func:`allocate_mean_squares` wrote; only ``"factored"`` uses it, and
            counts a step.
        compiled: Sum squares of rows and columns by numba where it is installed and takes the gradient.

    Returns:
        For each parameter with a gradient one or two tensors, float32 or better, with as many dimensions as the
        parameter: multiplied one after the other into the gradient's local part, they normalise it.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> p.grad = torch.tensor([[3.0, -3.0], [0.0, 0.0]])
        >>> (rows,) = gradient_factors([p], "rows")[p]
        >>> (rows * p.grad).round(decimals=4)
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    params = [p for p in params if p.grad is not None and p.numel() > 0]
    if not params:
        return {}
    kept = [_kept_dimensions(p, how) for p in params]
    gradients = [_as_placed(p) for p in params]
    known = _sums_by_kernel(gradients) if compiled and how == "factored" else {}
    sums = [_sums_of_squares(g, dims, known.get(id(g))) for g, dims in zip(gradients, kept, strict=True)]
    owners = [(p, dims) for p, of_p in zip(params, kept, strict=True) for dims in of_p]
    means = list(itertools.chain(*sums))
    _all_reduce((mean, summing_groups(p, dims), table_device(p)) for mean, (p, dims) in zip(means, owners, strict=True))
    torch._foreach_mul_(means, [math.prod(p.shape[d] for d in dims) / p.numel() for p, dims in owners])
    if how == "factored":
        assert state is not None
        means = _running_means([state[p] for p in params], means)
    # Of what has been zero at all times the gradient is zero, too, whatever it is divided by.
    torch._foreach_clamp_min_(means, torch.finfo(torch.float32).tiny)
    torch._foreach_sqrt_(means)
    factors, rest = {}, iter(means)
    for p, of_p in zip(params, kept, strict=True):
        roots = [next(rest) for _ in of_p]
        if len(roots) > 1:
            roots[1].div_(roots.pop(0))
        factors[p] = tuple(roots)
    torch._foreach_reciprocal_([root for roots in factors.values() for root in roots])
    return factors


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


def _sums_by_kernel(gradients: Iterable[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Those of rows and columns by the id of their gradient, where numba is installed and takes it."""
    kernels = compiled_module("hf_sai.kernels.numba_factored")
    if kernels is None:
        return {}
    matrices = [g for g in gradients if g.ndim > 1 and kernels.can_sum(g)]
    return dict(zip(map(id, matrices), kernels.sums_of_squares(matrices), strict=True))


def _sums_of_squares(
    gradient: Tensor, kept: Sequence[tuple[int, ...]], known: tuple[Tensor, Tensor] | None
) -> list[Tensor]:
    """For each set of kept dimensions the sum over the others, which stay with length 1; float32 or better."""
    if len(kept) == 1:
        return [_sum_of_squares(gradient, *kept)]
    rows, columns = _rows_and_columns(gradient, *kept[1:]) if known is None else known
    return [rows.sum(tuple(range(gradient.ndim)), keepdim=True), rows, columns]


def _sum_of_squares(gradient: Tensor, kept: tuple[int, ...]) -> Tensor:
    dims = _others(gradient, kept)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if not dims:
        return gradient.to(dtype).square()
    return torch.linalg.vector_norm(gradient, dim=dims, keepdim=True, dtype=dtype).square()


def _rows_and_columns(gradient: Tensor, *kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if not gradient.is_cpu or gradient.numel() == 0:
        rows, columns = (_sum_of_squares(gradient, dims) for dims in kept)
        return rows, columns
    # In pieces that stay in the cache; vector_norm over the first dimension takes 20 times as long there.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    squares = (piece.to(dtype).square() for piece in gradient.split(max(1, _PIECE // gradient[0].numel())))
    parts = [[piece.sum(_others(gradient, dims), keepdim=True) for dims in kept] for piece in squares]
    return torch.cat([rows for rows, _ in parts]), torch.stack([columns for _, columns in parts]).sum(0)


def _others(tensor: Tensor, kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in range(tensor.ndim) if d not in kept)


def _running_means(states: Sequence[dict[str, Any]], means: Sequence[Tensor]) -> list[Tensor]:
    """Add to the running means; returns them without the share that their start at 0 has in them."""
    running, shares = [], []
    for state in states:
        state["averaged_steps"] += 1
        own = [local_shard(state[name]) for name in MEAN_SQUARES if name in state]
        running += own
        shares += [1 - _KEPT ** state["averaged_steps"]] * len(own)
    torch._foreach_lerp_(running, [mean.to(torch.float32) for mean in means], 1 - _KEPT)
    return list(torch._foreach_div(running, shares))


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
