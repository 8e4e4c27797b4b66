"""The loops that numba compiles, over tables of addresses: one call works on all tensors of a step.

They stand in one file because numba's cache on disk looks at no other: a loop in another file could be a stale one.
Each inner loop is a function of its own, over slices: then LLVM sees that it can work on many elements at a time.

A table is int64[tensors, k], the addresses of a tensor's k arrays; a share is int64[parts, 3], for each part the
tensor, where the part begins in it and where it ends (elements). Whoever builds them has checked every size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

__all__ = [
    "add_squares",
    "divide_by_largest",
    "running_factors",
    "step_4bit",
    "step_8bit",
    "step_bfloat16",
    "step_factored",
    "step_plain",
    "write_4bit",
    "write_8bit",
]


def _compiler(*fastmath: str) -> Callable:
    """Compiles a loop that leaves Python's lock; the result is kept on disk where a folder can be written."""
    # numpy's errors: asking before each division whether it is by 0 would leave one element at a time.
    options: Any = {"nogil": True, "fastmath": set(fastmath), "error_model": "numpy"}

    def compile_loop(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that numba could keep it in
            return numba.njit(**options)(function)

    return compile_loop


#: May contract a product and a sum into one operation.
jit = _compiler("contract")

#: May add in another order, too.
jit_sums = _compiler("contract", "reassoc")


def _integer_as_pointer(typing_context, address):

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.PointerType(ir.IntType(8)))

    return types.voidptr(types.int64), code


_pointer: Any = intrinsic(_integer_as_pointer)


# --- one dtype: momentum and step


@jit
def step_plain(table, numbers, share):
    """p, g and m, or p and g without a momentum: float[tensors, 5] of decay, step, sign, weight and ahead."""
    for index in range(len(share)):
        tensor, start, stop = share[index]
        if start == stop:
            continue
        decay, step, sign, weight, ahead = numbers[tensor]
        p = carray(_pointer(table[tensor, 0]), (stop,), numbers.dtype)[start:stop]
        g = carray(_pointer(table[tensor, 1]), (stop,), numbers.dtype)[start:stop]
        if table.shape[1] == 2:
            _step_without_momentum(p, g, decay, step, sign)
        else:
            m = carray(_pointer(table[tensor, 2]), (stop,), numbers.dtype)[start:stop]
            _step(p, g, m, decay, step, sign, weight, ahead)


@jit
def _step(p, g, m, decay, step, sign, weight, ahead):
    for i in range(p.size):
        old = m[i]
        difference = sign * g[i] - old
        m[i] = old + weight * difference
        p[i] = decay * p[i] - step * (old + ahead * difference)


@jit
def _step_without_momentum(p, g, decay, step, sign):
    for i in range(p.size):
        p[i] = decay * p[i] - step * (sign * g[i])


# --- normalised gradients: a tensor is a matrix here, a vector a matrix of one row


@jit
def step_factored(table, numbers, share, averages):
    """p, g, m, and a factor for each row and each column; last in the table comes the number of columns.

    Numbers are those of :func:`step_plain`, or ``hf_sai.optim.rules.averaged.Numbers`` if it averages: m is e then.
    """
    for index in range(len(share)):
        tensor, done, stop = share[index]
        own = numbers[tensor]
        width = table[tensor, 5]
        p = carray(_pointer(table[tensor, 0]), (stop,), numbers.dtype)
        g = carray(_pointer(table[tensor, 1]), (stop,), numbers.dtype)
        m = carray(_pointer(table[tensor, 2]), (stop,), numbers.dtype)
        rows = carray(_pointer(table[tensor, 3]), ((stop - 1) // width + 1,), numbers.dtype)
        columns = carray(_pointer(table[tensor, 4]), (width,), numbers.dtype)
        while done < stop:
            row, column = divmod(done, width)
            end = min(done + width - column, stop)
            factors = columns[column : column + end - done]
            if averages:
                row_factor = own[0] * rows[row]
                _average_row(p[done:end], g[done:end], m[done:end], row_factor, factors, own[1], own[2], own[3], own[4])
            else:
                row_factor = own[2] * rows[row]
                _step_row(p[done:end], g[done:end], m[done:end], row_factor, factors, own[0], own[1], own[3], own[4])
            done = end


@jit
def _average_row(p, g, e, row, columns, decay, own, pull, kept):
    for i in range(p.size):
        u = g[i] * row * columns[i] + decay * p[i]
        difference = e[i] + u
        p[i] -= own * u + pull * difference
        e[i] = kept * difference


@jit
def _step_row(p, g, m, row, columns, decay, step, weight, ahead):
    for i in range(p.size):
        old = m[i]
        difference = g[i] * row * columns[i] - old
        m[i] = old + weight * difference
        p[i] = decay * p[i] - step * (old + ahead * difference)


@jit_sums
def add_squares(table, shapes, share, like):
    """Sums of squares of rows, and of columns piece by piece.

    Args:
        table: g, rows[height], columns[pieces, width], the last all 0.
        shapes: int64[tensors, 3]: height, width, rows in a piece.
        share: Its parts count pieces, not elements.
        like: An array of the gradients' dtype.
    """
    for index in range(len(share)):
        tensor, first, last = share[index]
        height, width, rows_in_piece = shapes[tensor]
        g = carray(_pointer(table[tensor, 0]), (height, width), like.dtype)
        rows = carray(_pointer(table[tensor, 1]), (height,), like.dtype)
        columns = carray(_pointer(table[tensor, 2]), (last, width), like.dtype)
        for piece in range(first, last):
            for i in range(piece * rows_in_piece, min((piece + 1) * rows_in_piece, height)):
                rows[i] = _add_squares_of_row(g[i], columns[piece])


@jit_sums
def _add_squares_of_row(row, columns):
    total = row.dtype.type(0)
    for j in range(row.size):
        square = row[j] * row[j]
        total += square
        columns[j] += square
    return total


@jit
def running_factors(table, shapes, corrections, kept, like):
    """Add the sums to the running means, and write what each row and column is to be multiplied by into the sums.

    Args:
        table: rows, columns, the running means of the whole, of rows and of columns (float32). Of a vector (0 rows in a
            piece) g, where the factors go, and the running means of its elements twice.
        shapes: int64[tensors, 3]: height, width, rows in a piece.
        corrections: float64[tensors, 2]: the share of the start at 0 that the running means are without, before this
            step and after it.
        kept: How much a running mean keeps.
        like: An array of the gradients' dtype.
    """
    for tensor in range(len(table)):
        height, width, rows_in_piece = shapes[tensor]
        before, after = np.float32(corrections[tensor, 0]), np.float32(corrections[tensor, 1])
        weight = np.float32(1 - kept)
        first = carray(_pointer(table[tensor, 0]), (height,), like.dtype)
        whole_mean = carray(_pointer(table[tensor, 2]), (1,), np.float32)
        if rows_in_piece == 0:
            g = carray(_pointer(table[tensor, 0]), (width,), like.dtype)
            factors = carray(_pointer(table[tensor, 1]), (width,), like.dtype)
            means = carray(_pointer(table[tensor, 2]), (width,), np.float32)
            for j in range(width):
                square = np.float32(g[j] * g[j])
                means[j] = _averaged(means[j], square, np.isfinite(square), before, weight)
                factors[j] = np.float32(1) / _root(means[j], after)
            continue
        pieces = (height - 1) // rows_in_piece + 1
        columns = carray(_pointer(table[tensor, 1]), (pieces, width), like.dtype)
        row_means = carray(_pointer(table[tensor, 3]), (height,), np.float32)
        column_means = carray(_pointer(table[tensor, 4]), (width,), np.float32)
        total = 0.0
        for i in range(height):
            total += first[i]
        for piece in range(1, pieces):
            for j in range(width):
                columns[0, j] += columns[piece, j]
        mean = np.float32(total / (np.float64(height) * width))
        usable = np.isfinite(mean)
        whole_mean[0] = _averaged(whole_mean[0], mean, usable, before, weight)
        whole = _root(whole_mean[0], after)
        by_row, by_column = like.dtype.type(1.0 / width), like.dtype.type(1.0 / height)
        for i in range(height):
            row_means[i] = _averaged(row_means[i], np.float32(first[i] * by_row), usable, before, weight)
            first[i] = np.float32(1) / (_root(row_means[i], after) / whole)
        for j in range(width):
            column_means[j] = _averaged(column_means[j], np.float32(columns[0, j] * by_column), usable, before, weight)
            columns[0, j] = np.float32(1) / _root(column_means[j], after)


@jit
def _averaged(running, mean, usable, before, weight):
    """The running mean with one more; what is not finite counts as what the running mean expects."""
    if not usable:
        mean = running / before if before > 0 else np.float32(1)
    return running + weight * (mean - running)


@jit
def _root(running, after):
    return np.sqrt(max(running / after, np.float32(1.1754943508222875e-38)))


# --- a momentum in fewer bits: block by block read, updated in float32, written again


@jit
def step_bfloat16(table, numbers, share):
    """p, g (float32) and the momentum's bits (uint16)."""
    scratch = np.empty(256, dtype=np.float32)
    bits = scratch.view(np.uint32)
    for index in range(len(share)):
        tensor, first, last = share[index]
        decay, step, sign, weight, ahead = numbers[tensor]
        p = carray(_pointer(table[tensor, 0]), (last,), np.float32)
        g = carray(_pointer(table[tensor, 1]), (last,), np.float32)
        codes = carray(_pointer(table[tensor, 2]), (last,), np.uint16)
        for start in range(first, last, scratch.size):
            stop = min(start + scratch.size, last)
            mine, m = codes[start:stop], scratch[: stop - start]
            _widen(mine, bits)
            _step(p[start:stop], g[start:stop], m, decay, step, sign, weight, ahead)
            _narrow(mine, bits)


@jit
def step_8bit(table, numbers, share, values, nearest, midpoints):
    """p, g (float32), codes (uint8) and the scale of each 256 of them (float32)."""
    scratch = np.empty(256, dtype=np.float32)
    bits = scratch.view(np.uint32)
    for index in range(len(share)):
        tensor, first, last = share[index]
        decay, step, sign, weight, ahead = numbers[tensor]
        p = carray(_pointer(table[tensor, 0]), (last,), np.float32)
        g = carray(_pointer(table[tensor, 1]), (last,), np.float32)
        codes = carray(_pointer(table[tensor, 2]), (last,), np.uint8)
        scales = carray(_pointer(table[tensor, 3]), ((last - 1) // scratch.size + 1,), np.float32)
        for start in range(first, last, scratch.size):
            stop = min(start + scratch.size, last)
            mine, m = codes[start:stop], scratch[: stop - start]
            _read_8bit(mine, values, scales[start // scratch.size], m)
            _step(p[start:stop], g[start:stop], m, decay, step, sign, weight, ahead)
            scales[start // scratch.size] = divide_by_largest(m, bits)
            write_8bit(mine, nearest, midpoints, m, bits)


@jit
def step_4bit(table, numbers, share, values, nearest, midpoints):
    """p, g (float32), codes (uint8, two to a byte) and the scale of each 128 of them (float32)."""
    scratch = np.empty(128, dtype=np.float32)
    bits = scratch.view(np.uint32)
    for index in range(len(share)):
        tensor, first, last = share[index]
        decay, step, sign, weight, ahead = numbers[tensor]
        p = carray(_pointer(table[tensor, 0]), (last,), np.float32)
        g = carray(_pointer(table[tensor, 1]), (last,), np.float32)
        codes = carray(_pointer(table[tensor, 2]), (last // 2,), np.uint8)
        scales = carray(_pointer(table[tensor, 3]), ((last - 1) // scratch.size + 1,), np.float32)
        for start in range(first, last, scratch.size):
            stop = min(start + scratch.size, last)
            mine, m = codes[start // 2 : stop // 2], scratch[: stop - start]
            _read_4bit(mine, values, scales[start // scratch.size], m)
            _step(p[start:stop], g[start:stop], m, decay, step, sign, weight, ahead)
            scales[start // scratch.size] = divide_by_largest(m, bits)
            write_4bit(mine, nearest, midpoints, m, bits)


@jit
def divide_by_largest(m, bits):
    """Bring the largest magnitude to 1, and return what it was; zeros stay."""
    largest = np.uint32(0)
    for i in range(m.size):  # as integers, whose maximum is many elements at a time; NaN is above all
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    scale = np.uint32(largest).view(np.float32)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(m.size):
        m[i] *= inverse
    return scale


@jit
def _widen(codes, bits):
    """bfloat16 to float32, both as bits."""
    for i in range(codes.size):
        bits[i] = np.uint32(codes[i]) << np.uint32(16)


@jit
def _narrow(codes, bits):
    """float32 to the nearest bfloat16, of two the even one; NaN stays NaN."""
    for i in range(codes.size):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        is_nan = (bits[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        rounded = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        codes[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@jit
def _read_8bit(codes, values, scale, m):
    for i in range(codes.size):
        m[i] = values[codes[i]] * scale


@jit
def write_8bit(codes, nearest, midpoints, m, bits):
    """The nearest code of each value in [-1, 1]: the table's by the value's first 16 bits, or the next."""
    for i in range(codes.size):
        code = nearest[bits[i] >> np.uint32(16)]
        codes[i] = code + (m[i] > midpoints[code])


@jit
def _read_4bit(codes, values, scale, m):
    for i in range(codes.size):  # two to a byte, the first in the upper half
        m[2 * i] = values[codes[i] >> 4] * scale
        m[2 * i + 1] = values[codes[i] & 15] * scale


@jit
def write_4bit(codes, nearest, midpoints, m, bits):
    """As :func:`write_8bit`, two to a byte."""
    for i in range(codes.size):
        upper, lower = nearest[bits[2 * i] >> np.uint32(16)], nearest[bits[2 * i + 1] >> np.uint32(16)]
        upper += m[2 * i] > midpoints[upper]
        lower += m[2 * i + 1] > midpoints[lower]
        codes[i] = upper << 4 | lower
