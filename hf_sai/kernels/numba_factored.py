"""Normalised gradients on CPU by numba: row and column sums in one pass over memory, normalisation and step in another.

A matrix here is any gradient of two dimensions or more: its rows belong to the indices of the first, its columns to
those of the others. Neither the number of threads nor where their parts begin changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from hf_sai.kernels import numba_kernel
from hf_sai.kernels.numba_kernel import coefficients, in_shares, jit
from hf_sai.optim.momentum import QuantizedMomentum

__all__ = ["can_sum", "can_update", "sums_of_squares", "update"]

#: Columns are summed over the rows of about this many elements, and these sums added up.
_PIECE = 1 << 20


def can_update(p: Tensor, g: Tensor, m: Tensor | QuantizedMomentum | None) -> bool:
    """Whether the kernel takes these: dense, of one dtype, float32 or float64, with a momentum."""
    return isinstance(m, Tensor) and numba_kernel.can_update(p, g, m)


def can_sum(gradient: Tensor) -> bool:
    """Whether the kernel takes it: dense, float32 or float64, with something in it."""
    return numba_kernel.can_update(gradient, gradient, None) and gradient.numel() > 0


def sums_of_squares(gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each gradient those of its rows and those of its columns, in its dtype and number of dimensions.

    Args:
        gradients: Two dimensions or more; :func:`can_sum` holds.
    """
    matrices = [g.detach().view(len(g), -1).numpy() for g in gradients]
    rows_in_piece = [max(1, _PIECE // matrix.shape[1]) for matrix in matrices]
    pieces = [-(-len(matrix) // count) for matrix, count in zip(matrices, rows_in_piece, strict=True)]
    rows = [np.empty(len(matrix), dtype=matrix.dtype) for matrix in matrices]
    columns = [
        np.zeros((count, matrix.shape[1]), dtype=matrix.dtype) for matrix, count in zip(matrices, pieces, strict=True)
    ]

    def run(index: int, start: int, stop: int) -> None:
        for piece in range(start // _PIECE, -(-stop // _PIECE)):
            own = slice(piece * rows_in_piece[index], (piece + 1) * rows_in_piece[index])
            _add_squares(matrices[index][own], rows[index][own], columns[index][piece])

    in_shares([count * _PIECE for count in pieces], run, _PIECE)
    return [
        (torch.from_numpy(of_rows).view(-1, *[1] * (g.ndim - 1)), torch.from_numpy(parts.sum(0)).view(1, *g.shape[1:]))
        for g, of_rows, parts in zip(gradients, rows, columns, strict=True)
    ]


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
    lr = float(lr)
    work = []
    for p, g, m, scale, factors in zip(params, grads, momentum_buffers, scales, grad_factors, strict=True):
        arrays = [t.detach().view(-1).numpy() for t in (p, g, m)]
        numbers = coefficients(arrays[0].dtype, scale, lr, momentum, weight_decay, -1.0 if maximize else 1.0)
        work.append((arrays, _rows_and_columns(g, factors), numbers))

    def run(index: int, start: int, stop: int) -> None:
        arrays, (rows, columns), numbers = work[index]
        p, g, m = (array[start:stop] for array in arrays)
        _step(p, g, m, rows, columns, start, *numbers)

    in_shares([p.numel() for p in params], run)


def _rows_and_columns(gradient: Tensor, factors: tuple[Tensor, ...]) -> list[np.ndarray]:
    """The factors as one number a row and one a column; a vector is one row."""
    height = gradient.shape[0] if gradient.ndim > 1 else 1
    rows, columns = gradient.new_ones(height), gradient.new_ones(gradient.numel() // height)
    for factor in factors:
        of_rows = factor.numel() == 1 or (gradient.ndim > 1 and factor.shape[0] > 1)
        (rows if of_rows else columns).mul_(factor.flatten())
    return [rows.numpy(), columns.numpy()]


# Each loop is a function of its own, over slices: then LLVM sees that it can work on many elements at a time.


@numba.njit(nogil=True, fastmath={"contract", "reassoc"})
def _add_squares(matrix, rows, columns):
    for i in range(matrix.shape[0]):
        rows[i] = _add_squares_of_row(matrix[i], columns)


@numba.njit(nogil=True, fastmath={"contract", "reassoc"})
def _add_squares_of_row(row, columns):
    total = row.dtype.type(0)
    for j in range(row.size):
        square = row[j] * row[j]
        total += square
        columns[j] += square
    return total


@jit
def _step(p, g, m, rows, columns, start, decay, step, sign, weight):
    """On a part of a matrix that begins at its element `start`."""
    done = 0
    while done < p.size:
        row, column = divmod(start + done, columns.size)
        stop = min(done + columns.size - column, p.size)
        factors = columns[column : column + stop - done]
        _step_row(p[done:stop], g[done:stop], m[done:stop], rows[row], factors, decay, step, sign, weight)
        done = stop


@jit
def _step_row(p, g, m, row, columns, decay, step, sign, weight):
    for i in range(p.size):
        direction = m[i] + weight * (sign * (g[i] * row * columns[i]) - m[i])
        m[i] = direction
        p[i] = decay * p[i] - step * direction
