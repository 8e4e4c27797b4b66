"""``update="factored"`` on a GPU in Triton: sums of squares and running means in one launch, with one pass over memory.

The step's own launch normalises (:mod:`hf_sai.kernels.triton_step`). A matrix here is any gradient of two dimensions or
more: its rows belong to the indices of the first, its columns to those of the others. Each program sums a tile and
leaves its part of every row and column; a tensor's last program adds these up. Sums are added in the same order in
every run: the same gradients give the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sai.kernels.triton_device import entry, pointer
from hf_sai.kernels.triton_step import DTYPES, LONGEST_ROW
from hf_sai.kernels.triton_tables import kept_table
from hf_sai.optim.layout import Part
from hf_sai.optim.rules.factored import KEPT, MEAN_SQUARES

__all__ = ["Factors", "factors"]

#: A program's tile, and how many of its rows are read at a time.
TILE_ROWS, TILE_COLUMNS, AT_A_TIME = 256, 256, 16

#: The last program adds up the parts of so many rows or columns at a time, so many parts at a time.
LINE, PARTS = 1024, 8


class Factors(Sequence[Tensor]):
    """The factors of one gradient, which become tensors when somebody asks for them; the step asks for addresses.

    Attributes:
        addresses: Where the factor of each row and of each column begins; 0 for a vector's one row.
    """

    __slots__ = ("_room", "_shape", "_start", "addresses")

    def __init__(self, room: Tensor, start: int, shape: torch.Size) -> None:
        self._room, self._start, self._shape = room, start, shape
        columns = room.data_ptr() + 4 * (start + (shape[0] if len(shape) > 1 else 0))
        self.addresses = (room.data_ptr() + 4 * start if len(shape) > 1 else 0, columns)

    def __len__(self) -> int:
        return 2 if len(self._shape) > 1 else 1

    def __getitem__(self, index: Any) -> Any:
        height, *width = self._shape if len(self._shape) > 1 else (0, *self._shape)
        own = self._room[self._start : self._start + height + torch.Size(width).numel()]
        if len(self._shape) < 2:
            return (own.view(self._shape),)[index]
        return (own[:height].view(height, *[1] * len(width)), own[height:].view(1, *width))[index]


def factors(parts: Mapping[int, Part]) -> dict[int, Sequence[Tensor]]:
    """Of those parts that Triton takes what :meth:`hf_sai.optim.rules.factored.Factored.factors` says, by their index.

    Their running means are brought up to date; all means must have been allocated.
    """
    buckets: dict[tuple, list[tuple[int, Part, tuple[int, ...]]]] = defaultdict(list)
    for index, part in parts.items():
        means = _addresses_of_means(part)
        if means is not None:
            buckets[part.grad.device, part.grad.dtype, part.state["averaged_steps"]].append((index, part, means))
    result: dict[int, Sequence[Tensor]] = {}
    for (device, dtype, steps), own in buckets.items():
        own.sort(key=lambda each: -each[1].grad.numel())  # others still work while the large ones are added up
        result |= zip(
            [index for index, _, _ in own],
            _factors_of_one_kind([p for _, p, _ in own], [m for *_, m in own], device, dtype, steps),
            strict=True,
        )
        for _, part, _ in own:
            part.state["averaged_steps"] = steps + 1
    return result


def _addresses_of_means(part: Part) -> tuple[int, ...] | None:
    """Of the means of the whole, of rows and of columns (of a vector's elements three times); None to refuse."""
    g = part.grad
    height, width = _lines(g)
    if g.dtype not in DTYPES or not g.is_contiguous() or g.numel() == 0 or width > LONGEST_ROW:
        return None
    addresses = []
    for key, size in zip(MEAN_SQUARES, (1, height, width) if height else (width,), strict=False):
        mean = part.state[key]
        if type(mean) is not Tensor or mean.device != g.device:
            return None
        if mean.numel() != size or mean.dtype != torch.float32 or not mean.is_contiguous():
            return None
        addresses.append(mean.data_ptr())
    return tuple(addresses) if height else tuple(addresses * 3)


def _lines(g: Tensor) -> tuple[int, int]:
    """Height and width; the height of a vector is 0 here."""
    return (g.shape[0], g.numel() // max(1, g.shape[0])) if g.ndim > 1 else (0, g.numel())


def _factors_of_one_kind(
    parts: Sequence[Part], means: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype, steps: int
) -> list[Factors]:
    gradients = [part.grad for part in parts]
    lines = [_lines(g) for g in gradients]
    programs, starts, parts_at = [], [], []
    room = room_of_parts = 0
    for height, width in lines:
        down, across = -(-height // TILE_ROWS), -(-width // TILE_COLUMNS)
        programs.append(down * across if height else -(-width // (TILE_ROWS * TILE_COLUMNS)))
        starts.append(room)
        parts_at.append(room_of_parts)
        room += height + width
        room_of_parts += across * height + down * width
    table = kept_table(
        "factored",
        device,
        [
            [g.data_ptr() for g in gradients],
            [height for height, _ in lines],
            [width for _, width in lines],
            starts,
            parts_at,
            *([of[which] for of in means] for which in range(3)),
            [0] * len(parts),  # programs that are done, counted on the device
        ],
        programs,
    )
    result = torch.empty(room, dtype=torch.float32, device=device)
    in_16_bytes = 16 // dtype.itemsize
    aligned = all(g.data_ptr() % 16 == 0 for g in gradients) and all(w % in_16_bytes == 0 for h, w in lines if h)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _add_squares[(len(table.owners),)](
            table.on_device,
            table.owners,
            len(parts),
            torch.empty(max(1, room_of_parts), dtype=torch.float32, device=device),
            result,
            1 - KEPT**steps,
            1 - KEPT ** (steps + 1),
            1 - KEPT,
            g_dtype=DTYPES[dtype],
            in_16_bytes=in_16_bytes if aligned else 1,
            tile_rows=TILE_ROWS,
            tile_columns=TILE_COLUMNS,
            at_a_time=AT_A_TIME,
            line=LINE,
            parts_at_a_time=PARTS,
            num_warps=8,
        )
    return [Factors(result, start, g.shape) for start, g in zip(starts, gradients, strict=True)]


@triton.jit
def _add_squares(  # type: ignore[no-untyped-def]
    table,  # first programs, then the rows above
    owners,  # int32[programs]
    tensors,
    parts,  # float32: of each tensor [strips of columns, height], then [strips of rows, width]
    factors,  # float32: of each tensor of its rows, then of its columns
    before,  # the share of the start at 0 that the running means are without: before this step,
    after,  # and after it
    weight,
    g_dtype: tl.constexpr,
    in_16_bytes: tl.constexpr,  # gradient's elements, if all rows begin at such a multiple; else 1
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    at_a_time: tl.constexpr,
    line: tl.constexpr,
    parts_at_a_time: tl.constexpr,
):
    tensor = tl.load(owners + tl.program_id(0))
    number = tl.program_id(0) - entry(table, tensors, 0, tensor)
    g = pointer(entry(table, tensors, 1, tensor), g_dtype, in_16_bytes > 1)
    height, width = entry(table, tensors, 2, tensor), entry(table, tensors, 3, tensor)
    factors += entry(table, tensors, 4, tensor)
    of_rows = parts + entry(table, tensors, 5, tensor)
    whole_mean = pointer(entry(table, tensors, 6, tensor), tl.float32, False)
    row_means = pointer(entry(table, tensors, 7, tensor), tl.float32, False)
    column_means = pointer(entry(table, tensors, 8, tensor), tl.float32, False)
    if height == 0:
        start = number * tile_rows * tile_columns
        for at in range(0, tile_rows * tile_columns, line):
            places = start + at + tl.arange(0, line)
            inside = places < width
            value = tl.load(g + places, mask=inside, other=0.0).to(tl.float32)
            square = value * value
            _average(column_means, factors, places, inside, square, tl.abs(square) < float("inf"), 1.0, before, after,
                     weight)  # fmt: skip
    else:
        across, down = tl.cdiv(width, tile_columns), tl.cdiv(height, tile_rows)
        of_columns = of_rows + across * height
        i, j = number // across, number % across
        if ((i + 1) * tile_rows <= height) & (
            (j + 1) * tile_columns <= width
        ):  # as in the step: no mask, wide accesses
            _add_tile(
                g, of_rows, of_columns, i, j, height, width, in_16_bytes, tile_rows, tile_columns, at_a_time, False
            )
        else:
            _add_tile(
                g, of_rows, of_columns, i, j, height, width, in_16_bytes, tile_rows, tile_columns, at_a_time, True
            )
        # All that this program has written must be seen by the one that counts last; as a grid's barrier would do it.
        tl.debug_barrier()
        done = table + 9 * tensors + tensor
        if tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == across * down - 1:
            tl.debug_barrier()
            tl.store(done, 0)  # for the next step
            _finish(of_rows, of_columns, factors, whole_mean, row_means, column_means, height, width, across, down,
                    before, after, weight, line, parts_at_a_time)  # fmt: skip


@triton.jit
def _add_tile(  # type: ignore[no-untyped-def]
    g, of_rows, of_columns, i, j, height, width, in_16_bytes: tl.constexpr, tile_rows: tl.constexpr,
    tile_columns: tl.constexpr, at_a_time: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Sums of squares over a tile's part of each row and of each column."""
    stride = width // in_16_bytes * in_16_bytes  # the width, known to be a multiple
    columns = j * tile_columns + tl.arange(0, tile_columns)
    sums = tl.zeros([at_a_time, tile_columns], dtype=tl.float32)
    for at in range(0, tile_rows, at_a_time):
        rows = i * tile_rows + at + tl.arange(0, at_a_time)
        places = rows[:, None] * stride + columns[None, :]
        if masked:
            value = tl.load(g + places, mask=(rows < height)[:, None] & (columns < width)[None, :], other=0.0)
        else:
            value = tl.load(g + places)
        value = value.to(tl.float32)
        sums += value * value
        tl.store(of_rows + j * height + rows, tl.sum(value * value, axis=1), mask=rows < height)
    tl.store(of_columns + i * width + columns, tl.sum(sums, axis=0), mask=columns < width)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    of_rows, of_columns, factors, whole_mean, row_means, column_means, height, width, across, down, before, after,
    weight, line: tl.constexpr, parts_at_a_time: tl.constexpr,
):  # fmt: skip
    """Add up what the tiles left, bring the running means up to date, and write the factors."""
    totals = tl.zeros([line], dtype=tl.float32)
    at = 0  # `while`, not `range`: Triton's interpreter up to 3.6 takes no tensor there
    while at < height:
        places = at + tl.arange(0, line)
        sums = _added_up(of_rows, places, across, height, line, parts_at_a_time)
        totals += sums
        tl.store(factors + places, sums, mask=places < height)
        at += line
    tl.debug_barrier()  # the sums are read below, perhaps by other threads
    by_row, by_column = 1.0 / width.to(tl.float32), 1.0 / height.to(tl.float32)
    mean = tl.sum(totals, axis=0) * by_row * by_column
    usable = tl.abs(mean) < float("inf")  # false for NaN, too
    running = _averaged(tl.load(whole_mean), mean, usable, before, weight)
    tl.store(whole_mean, running)
    whole = _root(running, after)
    at = 0
    while at < height:
        places = at + tl.arange(0, line)
        inside = places < height
        means = tl.load(factors + places, mask=inside, other=0.0) * by_row
        _average(row_means, factors, places, inside, means, usable, whole, before, after, weight)
        at += line
    at = 0
    while at < width:
        places = at + tl.arange(0, line)
        means = _added_up(of_columns, places, down, width, line, parts_at_a_time) * by_column
        _average(column_means, factors + height, places, places < width, means, usable, 1.0, before, after, weight)
        at += line


@triton.jit
def _added_up(parts, places, count, length, line: tl.constexpr, parts_at_a_time: tl.constexpr):  # type: ignore[no-untyped-def]
    sums = tl.zeros([parts_at_a_time, line], dtype=tl.float32)
    first = 0
    while first < count:
        which = first + tl.arange(0, parts_at_a_time)
        inside = (which < count)[:, None] & (places < length)[None, :]
        sums += tl.load(parts + which[:, None] * length + places[None, :], mask=inside, other=0.0)
        first += parts_at_a_time
    return tl.sum(sums, axis=0)


@triton.jit
def _average(means, factors, places, inside, new, usable, whole, before, after, weight):  # type: ignore[no-untyped-def]
    """Running means with one more, and the factors that follow."""
    running = _averaged(tl.load(means + places, mask=inside, other=0.0), new, usable, before, weight)
    tl.store(means + places, running, mask=inside)
    tl.store(factors + places, whole / _root(running, after), mask=inside)


@triton.jit
def _averaged(running, new, usable, before, weight):  # type: ignore[no-untyped-def]
    """What is not finite counts as what the running mean expects."""
    expected = tl.where(before > 0, running / tl.where(before > 0, before, 1.0), 1.0)
    return running + weight * (tl.where(usable, new, expected) - running)


@triton.jit
def _root(running, after):  # type: ignore[no-untyped-def]
    # The least normal number: a divisor must not be 0. NaN is never kept in a running mean.
    return tl.sqrt(tl.maximum(running / after, 1.1754943508222875e-38))
