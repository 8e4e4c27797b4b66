"""``update="factored"`` on CPU by numba: sums and running means in one pass over memory, the step in another.

A matrix here is any gradient of two dimensions or more: its rows belong to the indices of the first, its columns to
those of the others. Neither the number of threads nor where their parts begin changes a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sai.kernels import numba_loops, numba_plain
from hf_sai.kernels.numba_plain import DTYPES, addresses, by_dtype, coefficients, in_shares
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import Momentum
from hf_sai.optim.rules.factored import KEPT, MEAN_SQUARES

__all__ = ["can_update", "factors", "update"]

#: Columns are summed over the rows of about this many elements, and these sums added up.
_PIECE = 1 << 20


def can_update(p: Tensor, g: Tensor, m: Momentum | None) -> bool:
    """Whether the kernel takes these: dense, of one dtype, float32 or float64, with a momentum."""
    return m is not None and p.numel() > 0 and numba_plain.can_update(p, g, m)


def factors(parts: Mapping[int, Part]) -> dict[int, tuple[Tensor, ...]]:
    """Of those parts that numba takes what :meth:`hf_sai.optim.rules.factored.Factored.factors` says, by their index.

    Their running means are brought up to date; all means must have been allocated.
    """
    result: dict[int, tuple[Tensor, ...]] = {}
    taken = {index: part for index, part in parts.items() if _can_average(part)}
    for dtype in DTYPES:
        own = {index: part for index, part in taken.items() if part.grad.dtype == dtype}
        if own:
            result |= zip(own, _factors_of_one_dtype(list(own.values()), dtype), strict=True)
    return result


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    scales: Sequence[float],
    *,
    grad_factors: Sequence[tuple[Tensor, ...]],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts."""
    for dtype, indices in by_dtype(params).items():
        rows, columns = zip(*(_rows_and_columns(grads[i], grad_factors[i]) for i in indices), strict=True)
        table = addresses(
            *([of_kind[i] for i in indices] for of_kind in (params, grads, momentum_buffers)), rows, columns
        )
        widths = np.array([column.numel() for column in columns], dtype=np.int64)
        sign = -1.0 if maximize else 1.0
        numbers = coefficients(dtype, [scales[i] for i in indices], lr, momentum, weight_decay, sign)
        sizes = [params[i].numel() for i in indices]
        in_shares(sizes, lambda share: numba_loops.step_factored(table, numbers, widths, share))  # noqa: B023


def _can_average(part: Part) -> bool:
    g = part.grad
    if not (g.is_cpu and g.dtype in DTYPES and g.is_contiguous() and g.numel() > 0):
        return False
    means = [part.state[key] for key in MEAN_SQUARES if key in part.state]
    return all(type(mean) is Tensor and mean.is_cpu and mean.dtype == torch.float32 for mean in means) and all(
        mean.is_contiguous() and mean.numel() == size for mean, size in zip(means, _mean_sizes(g), strict=True)
    )


def _mean_sizes(g: Tensor) -> tuple[int, ...]:
    return (g.numel(),) if g.ndim < 2 else (1, len(g), g.numel() // len(g))


def _factors_of_one_dtype(parts: Sequence[Part], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    shapes = np.array([_shape(part.grad) for part in parts], dtype=np.int64)  # height, width, rows in a piece
    pieces = [-(-height // rows) if rows else 0 for height, width, rows in shapes.tolist()]
    # For each tensor room for its rows' sums and its columns', a vector's factors lying where the columns' would.
    needs = [
        (height if rows else 0, width * (count or 1))
        for (height, width, rows), count in zip(shapes.tolist(), pieces, strict=True)
    ]
    ends = np.cumsum(needs).tolist()
    sums = torch.zeros(ends[-1], dtype=dtype)
    base, size = sums.data_ptr(), sums.element_size()
    starts = [0, *ends[:-1]]
    table, corrections, result = [], [], []
    for index, (part, (height, width, rows)) in enumerate(zip(parts, shapes.tolist(), strict=True)):
        state, g = part.state, part.grad
        at_rows, at_columns = starts[2 * index], starts[2 * index + 1]
        means = [state[key].data_ptr() for key in MEAN_SQUARES if key in state]
        first = base + at_rows * size if rows else g.data_ptr()
        table.append((first, base + at_columns * size, *(means if rows else means * 3)))
        corrections.append((1 - KEPT ** state["averaged_steps"], 1 - KEPT ** (state["averaged_steps"] + 1)))
        state["averaged_steps"] += 1
        # Views of the sums, which the loop replaces by the factors.
        of_columns = sums.as_strided((1, *g.shape[1:]) if rows else g.shape, _strides(g, rows), at_columns)
        of_rows = (sums.as_strided((height, *[1] * (g.ndim - 1)), [1] * g.ndim, at_rows),) if rows else ()
        result.append((*of_rows, of_columns))
    like = np.empty(0, dtype=DTYPES[dtype])
    matrices = [index for index, count in enumerate(pieces) if count]
    if matrices:
        of_squares = np.array([(parts[i].grad.data_ptr(), *table[i][:2]) for i in matrices], dtype=np.int64)
        # A piece counts as so many elements that threads are worth their start when there are many.
        counts = [pieces[i] * _PIECE if pieces[i] > 1 else parts[i].grad.numel() for i in matrices]
        own = shapes[matrices]
        in_shares(counts, lambda share: numba_loops.add_squares(of_squares, own, _in_pieces(share), like), _PIECE)
    numba_loops.running_factors(np.array(table, dtype=np.int64), shapes, np.array(corrections), KEPT, like)
    return result


def _in_pieces(share: np.ndarray) -> np.ndarray:
    """A share in elements as one in pieces."""
    share = share.copy()
    share[:, 1] //= _PIECE
    share[:, 2] = -(-share[:, 2] // _PIECE)
    return share


def _shape(g: Tensor) -> tuple[int, int, int]:
    """Height, width and rows in a piece of a gradient; a vector has 0 of these."""
    if g.ndim < 2:
        return 1, g.numel(), 0
    width = g.numel() // len(g)
    return len(g), width, max(1, _PIECE // width)


def _strides(g: Tensor, is_matrix: int) -> tuple[int, ...]:
    return (g.stride()[1:] and (1, *g.stride()[1:])) if is_matrix else g.stride()


def _rows_and_columns(gradient: Tensor, factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The factors as one number a row and one a column; a vector is one row."""
    height = gradient.shape[0] if gradient.ndim > 1 else 1
    width = gradient.numel() // height
    sizes = tuple(factor.numel() for factor in factors)
    if all(factor.dtype == gradient.dtype and factor.is_contiguous() for factor in factors):
        if sizes == (height, width) and gradient.ndim > 1:
            return factors[0], factors[1]
        if sizes == (width,) and gradient.ndim < 2:
            return _ONE[gradient.dtype], factors[0]
    rows, columns = gradient.new_ones(height), gradient.new_ones(width)
    for factor in factors:
        of_rows = factor.numel() == 1 or (gradient.ndim > 1 and factor.shape[0] > 1)
        (rows if of_rows else columns).mul_(factor.flatten())
    return rows, columns


_ONE: dict[Any, Tensor] = {dtype: torch.ones(1, dtype=dtype) for dtype in DTYPES}
