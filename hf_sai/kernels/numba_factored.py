"""``update="factored"`` on CPU by numba: sums and running means in one pass over memory, the step in another.

A matrix here is any gradient of two dimensions or more: its rows belong to the indices of the first, its columns to
those of the others. Neither the number of threads nor where their parts begin changes a bit.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sai.kernels import numba_loops, numba_plain
from hf_sai.kernels.numba_plain import DTYPES, addresses, coefficients, in_shares, of_one_dtype
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import Momentum
from hf_sai.optim.rules.averaged import Step
from hf_sai.optim.rules.factored import KEPT, MEAN_SQUARES

__all__ = ["Factors", "average", "can_update", "factors", "update"]

_WHOLE, _ROWS, _COLUMNS = MEAN_SQUARES

_FLOAT32 = torch.float32

#: Columns are summed over the rows of about this many elements, and these sums added up.
_PIECE = 1 << 20


def can_update(p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor] = ()) -> bool:
    """Whether the kernel takes these: dense, of one dtype, float32 or float64, with a momentum."""
    return m is not None and p.numel() > 0 and numba_plain.can_update(p, g, m)


def factors(parts: Mapping[int, Part]) -> dict[int, Sequence[Tensor]]:
    """Of those parts that numba takes what :meth:`hf_sai.optim.rules.factored.Factored.factors` says, by their index.

    Their running means are brought up to date; all means must have been allocated.
    """
    taken: dict[torch.dtype, dict[int, tuple[int, ...]]] = {dtype: {} for dtype in DTYPES}
    for index, part in parts.items():
        g = part.grad
        if (dtype := g.dtype) in taken and g.is_cpu and g.is_contiguous():
            means = _addresses_of_means(part.state, g.shape)
            if 0 not in means:
                taken[dtype][index] = means
    result: dict[int, Sequence[Tensor]] = {}
    for dtype, means_of in taken.items():
        if means_of:
            own = [parts[index] for index in means_of]
            result |= zip(means_of, _factors_of_one_dtype(own, list(means_of.values()), dtype), strict=True)
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
    ahead: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts."""
    sign = -1.0 if maximize else 1.0
    for dtype, lists in of_one_dtype(params, params, grads, momentum_buffers, grad_factors, scales):
        *tensors, own_scales = lists
        _step(tensors, coefficients(dtype, own_scales, lr, momentum, ahead, weight_decay, sign), averages=False)


def average(steps: Sequence[Step]) -> list[Step]:
    """Make those steps of ``update="averaged"`` that the kernel takes; returns the others."""
    own: list[Step] = []
    others: list[Step] = []
    for step in steps:
        (own if can_update(step.part.param, step.part.grad, step.e) else others).append(step)
    params = [step.part.param for step in own]
    for dtype, (mine,) in of_one_dtype(params, own):
        tensors = zip(*((step.part.param, step.part.grad, step.e, step.factors) for step in mine), strict=True)
        _step(list(tensors), np.array([step.numbers for step in mine], dtype=dtype), averages=True)
    return others


def _step(lists: Sequence[Sequence[Any]], numbers: np.ndarray, averages: bool) -> None:
    params, grads, momenta, factors = lists
    own = list(map(_factors, grads, factors))  # keeps what is made here for as long as needed
    table = np.empty((len(own), 6), dtype=np.int64)
    table[:, :3] = addresses(params, grads, momenta)
    table[:, 3:] = [each.place for each in own]
    in_shares([p.numel() for p in params], lambda share: numba_loops.step_factored(table, numbers, share, averages))


def _addresses_of_means(state: Mapping[str, Any], shape: torch.Size) -> tuple[int, ...]:
    """Of a matrix's three running means, of a vector's one three times; with a 0 where one is not what loops take."""
    if len(shape) < 2:
        return (_address(state[_WHOLE], shape.numel()),) * 3
    height = shape[0]
    width = shape.numel() // height if height else 0
    return _address(state[_WHOLE], 1), _address(state[_ROWS], height), _address(state[_COLUMNS], width)


def _address(mean: Tensor, size: int) -> int:
    """Where so many running means lie; 0 if they do not, or not as the loops take them, or are none."""
    fits = type(mean) is Tensor and mean.dtype is _FLOAT32 and mean.numel() == size and mean.is_contiguous()
    return mean.data_ptr() if fits else 0


def _factors_of_one_dtype(parts: Sequence[Part], means: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Factors]:
    gradients = np.array([part.grad.data_ptr() for part in parts], dtype=np.int64)
    room = _room(tuple(part.grad.shape for part in parts), _PIECE)
    sums = torch.zeros(room.elements, dtype=dtype)
    table = np.empty((len(parts), 5), dtype=np.int64)
    table[:, :2] = room.starts * sums.element_size() + sums.data_ptr()
    table[:, 2:] = means
    like = np.empty(0, dtype=DTYPES[dtype])
    if len(room.matrices):
        of_squares = np.empty((len(room.matrices), 3), dtype=np.int64)
        of_squares[:, 0] = gradients[room.matrices]
        of_squares[:, 1:] = table[room.matrices, :2]
        shapes = room.shapes[room.matrices]
        in_shares(
            room.counts, lambda share: numba_loops.add_squares(of_squares, shapes, _in_pieces(share), like), _PIECE
        )
    table[room.vectors, 0] = gradients[room.vectors]
    corrections = np.empty((len(parts), 2))
    for steps, indices in _count(parts).items():
        corrections[indices] = 1 - KEPT**steps, 1 - KEPT ** (steps + 1)
    numba_loops.running_factors(table, room.shapes, corrections, KEPT, like)
    table[room.vectors, 0] = _ONE[dtype].data_ptr()  # a vector is one row, of factor 1
    table[:, 2] = room.shapes[:, 1]
    return [Factors(sums, views, place) for place, views in zip(table[:, :3].tolist(), room.views, strict=True)]


def _count(parts: Sequence[Part]) -> dict[int, list[int]]:
    """Count a step of each part; steps before it -> the indices of the parts that had made so many."""
    indices: dict[int, list[int]] = defaultdict(list)
    for index, part in enumerate(parts):
        steps = part.state["averaged_steps"]
        part.state["averaged_steps"] = steps + 1
        indices[steps].append(index)
    return indices


class Factors(Sequence[Tensor]):
    """The factors of one gradient, which become tensors when somebody asks for them; the step asks for addresses.

    Attributes:
        place: The addresses of the rows' factors and of the columns', and the number of columns.
    """

    __slots__ = ("_sums", "_views", "place")

    def __init__(self, sums: Tensor, views: tuple[tuple[Any, Any, int], ...], place: Sequence[int]) -> None:
        self._sums, self._views, self.place = sums, views, place

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: Any) -> Any:
        return self._sums.as_strided(*self._views[index])


@dataclass(frozen=True)
class _Room:
    """Where the sums of many gradients, and then their factors, lie in one tensor; the same in every step.

    Attributes:
        elements: The tensor's.
        shapes: int64[gradients, 3]: height, width, rows in a piece; a vector is one row, and has 0 of these.
        starts: int64[gradients, 2]: where sums of rows begin and those of columns, or a vector's factors.
        views: For each gradient size, stride and offset of its factors.
        matrices: The indices of those that have rows, int64.
        vectors: Those of the others.
        counts: Elements of the matrices for :func:`in_shares`, whose pieces count as many as they can have.
    """

    elements: int
    shapes: np.ndarray
    starts: np.ndarray
    views: list[tuple[tuple[Any, Any, int], ...]]
    matrices: np.ndarray
    vectors: np.ndarray
    counts: list[int]


@functools.lru_cache(maxsize=32)
def _room(shapes: tuple[torch.Size, ...], piece: int) -> _Room:
    lines: list[tuple[int, int, int]] = []
    starts: list[tuple[int, int]] = []
    views: list[tuple[tuple[Any, Any, int], ...]] = []
    matrices: list[int] = []
    counts: list[int] = []
    end = 0
    for index, shape in enumerate(shapes):
        strides = torch.empty(shape, device="meta").stride()
        if len(shape) < 2:
            lines.append((1, shape.numel(), 0))
            starts.append((end, end))
            views.append(((tuple(shape), strides, end),))
            end += shape.numel()
            continue
        height, width = shape[0], shape.numel() // shape[0]
        rows = max(1, piece // width)
        pieces = -(-height // rows)
        lines.append((height, width, rows))
        starts.append((end, end + height))
        of_rows = ((height, *[1] * (len(shape) - 1)), [1] * len(shape), end)
        views.append((of_rows, ((1, *shape[1:]), (1, *strides[1:]), end + height)))
        end += height + pieces * width
        matrices.append(index)
        counts.append(pieces * piece if pieces > 1 else shape.numel())
    vectors = [index for index, line in enumerate(lines) if not line[2]]
    table, begin, of_matrices, of_vectors = (np.array(x, dtype=np.int64) for x in (lines, starts, matrices, vectors))
    return _Room(end, table, begin, views, of_matrices, of_vectors, counts)


def _in_pieces(share: np.ndarray) -> np.ndarray:
    """A share in elements as one in pieces."""
    share = share.copy()
    share[:, 1] //= _PIECE
    share[:, 2] = -(-share[:, 2] // _PIECE)
    return share


def _factors(gradient: Tensor, factors: Sequence[Tensor]) -> Factors:
    """Any factors as one number a row and one a column; a vector is one row."""
    if isinstance(factors, Factors):
        return factors
    height = gradient.shape[0] if gradient.ndim > 1 else 1
    sums = gradient.new_ones(height + gradient.numel() // height)
    rows, columns = sums[:height], sums[height:]
    for factor in factors:
        of_rows = factor.numel() == 1 or (gradient.ndim > 1 and factor.shape[0] > 1)
        (rows if of_rows else columns).mul_(factor.flatten())
    return Factors(sums, (), (rows.data_ptr(), columns.data_ptr(), len(columns)))


_ONE: dict[Any, Tensor] = {dtype: torch.ones(1, dtype=dtype) for dtype in DTYPES}
