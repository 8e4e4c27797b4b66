"""The step of all tensors in one kernel launch on a GPU, in Triton: p, g and m are read and p and m written, once.

A launch takes the tensors of one combination of dtypes, whatever their sizes. Nothing comes back to the host. Learning
rate, gradient scale and found_inf may be tensors on the device. The formats of the momentum are those of
:mod:`hf_sai.optim.momentum`, and nothing but torch and triton is needed.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sai.kernels.triton_device import (
    entry,
    pointer,
    read_4bit,
    read_8bit,
    rounded_at_random,
    write_4bit,
    write_8bit,
)
from hf_sai.kernels.triton_tables import float_bits, kept_table
from hf_sai.optim.codes import QUANTIZED, code_values, midpoints
from hf_sai.optim.momentum import Momentum, QuantizedMomentum
from hf_sai.optim.update import is_ordinary

__all__ = ["can_update", "factor_addresses", "update"]

#: Elements of one program; a multiple of those that share a scale.
BLOCK = 2048

#: A row of more elements is not normalised here: places in it are counted in 32 bits.
LONGEST_ROW = 2**31 - 2 * BLOCK

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def can_update(p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor] = ()) -> bool:
    """Whether the kernel takes these: dense, of 16- or 32-bit float dtypes, which may differ; no Tensor subclasses.

    Args:
        p: Parameter.
        g: Gradient.
        m: Momentum, in 8 or 4 bits, too.
        factors: What the gradient is to be multiplied by, as :mod:`hf_sai.optim.rules` gives it.
    """
    numel, device = p.numel(), p.device
    if not is_ordinary(p):
        return False
    if isinstance(m, QuantizedMomentum):
        kept = (m.codes, m.scales)
        if not (m.fits(p) and all(t.is_contiguous() and t.device == device for t in kept)):
            return False
        m = None
    return all(
        isinstance(t, Tensor) and t.dtype in DTYPES and t.is_contiguous() and t.device == device and t.numel() == numel
        for t in ((p, g) if m is None else (p, g, m))
    ) and (not factors or factor_addresses(g, factors) is not None)


def factor_addresses(g: Tensor, factors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Where the factors of a gradient's rows and of its columns begin, 0 where they are 1; a vector is one row.

    None for factors of other shapes than one a row, one a column, or both, and for rows that are too long.
    """
    known = getattr(factors, "addresses", None)
    if known is not None:
        return known
    of_rows, of_columns = ((1,) * g.ndim, g.shape) if g.ndim < 2 else ((len(g), *[1] * (g.ndim - 1)), (1, *g.shape[1:]))
    shapes = [tuple(f.shape) for f in factors]
    if math.prod(of_columns) > LONGEST_ROW or not all(f.dtype == torch.float32 and f.is_contiguous() for f in factors):
        return None
    if shapes == [of_rows]:
        return factors[0].data_ptr(), 0
    if shapes == [tuple(of_columns)]:
        return 0, factors[0].data_ptr()
    return (factors[0].data_ptr(), factors[1].data_ptr()) if shapes == [of_rows, tuple(of_columns)] else None


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Momentum | None],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    ahead: float,
    weight_decay: float,
    maximize: bool,
    stochastic_rounding: bool = False,
    grad_factors: Sequence[Sequence[Tensor]] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts.

    Computes in float32 and rounds once to each tensor's dtype.
    """
    if isinstance(lr, Tensor) and lr.device != params[0].device:
        lr = lr.item()
    factors = grad_factors or [()] * len(params)
    kept: Sequence[Momentum | None] = momentum_buffers if momentum != 0 else [None] * len(params)
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for i, (p, g, m) in enumerate(zip(params, grads, kept, strict=True)):
        if p.numel() > 0:
            buckets[p.device, p.dtype, g.dtype, _kind(m), len(factors[i]) > 0].append(i)
    for (device, p_dtype, g_dtype, kind, normalised), indices in buckets.items():
        rows = _rows(*([of[i] for i in indices] for of in (params, grads, kept, factors)))
        aligned = all(address % 16 == 0 for row in rows[:3] for address in row)
        sizes = [params[i].numel() for i in indices]
        table = kept_table(
            "step",
            device,
            [*rows, sizes, float_bits([scales[i] for i in indices])],
            [-(-size // BLOCK) for size in sizes],
        )
        rounds = stochastic_rounding and p_dtype == torch.bfloat16
        quantized = kind if isinstance(kind, str) else None
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _step[(len(table.owners),)](
                table.on_device,
                table.owners,
                len(indices),
                lr if isinstance(lr, Tensor) else float(lr),
                float(weight_decay),
                1.0 - momentum,
                ahead,
                -1.0 if maximize else 1.0,
                grad_scale,
                found_inf,
                # From torch's generator, as other paths draw; on the device, where replays of a graph draw anew.
                torch.randint(1 << 62, (1,), device=device) if rounds else None,
                *(_code_tables(quantized, device) if quantized else (None, None, None)),
                p_dtype=DTYPES[p_dtype],
                g_dtype=DTYPES[g_dtype],
                m_dtype=None if kind is None else tl.uint8 if quantized else DTYPES[kind],
                per_scale=QUANTIZED[quantized] if quantized else 0,
                four_bits=quantized == "4bit",
                normalised=normalised,
                lr_on_device=isinstance(lr, Tensor),
                aligned=aligned,
                block_size=BLOCK,
            )


def _kind(m: Momentum | None) -> torch.dtype | str | None:
    return m.kind if isinstance(m, QuantizedMomentum) else None if m is None else m.dtype


def _rows(params: Any, grads: Any, kept: Any, factors: Any) -> list[list[int]]:
    """A table's first rows: p, g, m, the momentum's scales, factors of rows and of columns, columns."""
    quantized = isinstance(kept[0], QuantizedMomentum)
    buffers = [m.codes if quantized else m for m in kept]
    of_factors: list[Any] = [factor_addresses(g, f) if len(f) else (0, 0) for g, f in zip(grads, factors, strict=True)]
    return [
        [p.data_ptr() for p in params],
        [g.data_ptr() for g in grads],
        [0 if m is None else m.data_ptr() for m in buffers],
        [m.scales.data_ptr() if quantized else 0 for m in kept],
        [rows for rows, _ in of_factors],
        [columns for _, columns in of_factors],
        [g.numel() // g.shape[0] if g.ndim > 1 else g.numel() for g in grads],
    ]


@functools.cache
def _code_tables(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values; uint8[65536], the nearest code of the least number that begins with these 16 bits; midpoints.

    Of all numbers that begin so at most one is a midpoint, so that the nearest code of each is this one or the next.
    """
    bits = torch.arange(65536, dtype=torch.int32, device="cpu") << 16
    bits[32768:] |= 0xFFFF  # of negative numbers the least has the most bits
    least = torch.nan_to_num(bits.view(torch.float32), nan=0.0)
    nearest = torch.bucketize(least, midpoints(kind, torch.device("cpu"))[:-1]).to(torch.uint8)
    return code_values(kind, device), nearest.to(device), midpoints(kind, device)


@triton.jit
def _step(
    table,  # first programs, then the rows of _rows, sizes, scales
    owners,  # int32[programs]
    tensors,
    lr,  # a number or a tensor
    weight_decay,
    weight,
    ahead,
    sign,
    grad_scale,  # tensors or None
    found_inf,
    seed,
    values,  # _code_tables
    nearest,
    midpoints,
    p_dtype: tl.constexpr,
    g_dtype: tl.constexpr,
    m_dtype: tl.constexpr,
    per_scale: tl.constexpr,  # 0 for a momentum in a float dtype
    four_bits: tl.constexpr,
    normalised: tl.constexpr,
    lr_on_device: tl.constexpr,
    aligned: tl.constexpr,
    block_size: tl.constexpr,
):
    if found_inf is not None:  # noqa: SIM102 - Triton's `and` would evaluate both
        if tl.load(found_inf) > 0:
            return
    if lr_on_device:
        lr = tl.load(lr).to(tl.float32)
    if grad_scale is not None:
        sign = sign / tl.load(grad_scale)
    tensor = tl.load(owners + tl.program_id(0))
    block = tl.program_id(0) - entry(table, tensors, 0, tensor)  # int64, as tables are
    start = block * block_size
    left = entry(table, tensors, 8, tensor) - start
    step = lr * entry(table, tensors, 9, tensor).to(tl.float64, bitcast=True).to(tl.float32)
    if left >= block_size:  # without a mask, several elements go in one memory access
        _update_block(
            table, tensors, tensor, block, start, left, lr * weight_decay, step, weight, ahead, sign, seed, values,
            nearest, midpoints, p_dtype, g_dtype, m_dtype, per_scale, four_bits, normalised, aligned, False, block_size,
        )  # fmt: skip
    else:
        _update_block(
            table, tensors, tensor, block, start, left, lr * weight_decay, step, weight, ahead, sign, seed, values,
            nearest, midpoints, p_dtype, g_dtype, m_dtype, per_scale, four_bits, normalised, aligned, True, block_size,
        )  # fmt: skip


@triton.jit
def _update_block(
    table, tensors, tensor, block, start, left, decay, step, weight, ahead, sign, seed, values, nearest, midpoints,
    p_dtype: tl.constexpr, g_dtype: tl.constexpr, m_dtype: tl.constexpr, per_scale: tl.constexpr,
    four_bits: tl.constexpr, normalised: tl.constexpr, aligned: tl.constexpr, masked: tl.constexpr,
    block_size: tl.constexpr,
):  # fmt: skip
    if per_scale > 0:
        blocks: tl.constexpr = block_size // per_scale
        offsets = tl.arange(0, blocks)[:, None] * per_scale + tl.arange(0, per_scale)[None, :]
    else:
        offsets = tl.arange(0, block_size)
    inside = offsets < left if masked else None
    # --- gradient
    g = pointer(entry(table, tensors, 2, tensor), g_dtype, aligned) + start
    direction = sign * tl.load(g + offsets, mask=inside).to(tl.float32)
    if normalised:
        direction *= _factors(table, tensors, tensor, start, left, offsets)
    # --- momentum
    if m_dtype is not None:
        m = pointer(entry(table, tensors, 3, tensor), m_dtype, aligned)
        if per_scale == 0:
            m += start
            old = tl.load(m + offsets, mask=inside).to(tl.float32)
            difference = direction - old
            tl.store(m + offsets, (old + weight * difference).to(m_dtype), mask=inside)
            direction = old + ahead * difference
        else:
            firsts = tl.arange(0, blocks) * per_scale
            scales = pointer(entry(table, tensors, 4, tensor), tl.float32, False) + start // per_scale
            scales += tl.arange(0, blocks)
            if four_bits:
                m += start // 2
                pairs = tl.arange(0, blocks)[:, None] * (per_scale // 2) + tl.arange(0, per_scale // 2)[None, :]
                whole = pairs * 2 < left if masked else None
                old = read_4bit(m, values, pairs, whole, blocks, per_scale)
            else:
                m += start
                old = read_8bit(m, values, offsets, inside)
            old *= tl.load(scales, mask=firsts < left, other=0.0)[:, None]
            difference = direction - old
            new = old + weight * difference
            if masked:
                new = tl.where(inside, new, 0.0)
            if four_bits:
                largest = write_4bit(m, nearest, midpoints, new, pairs, whole, blocks, per_scale)
            else:
                largest = write_8bit(m, nearest, midpoints, new, offsets, inside)
            tl.store(scales, largest, mask=firsts < left)
            direction = old + ahead * difference
    # --- decoupled weight decay and scaled step
    p = pointer(entry(table, tensors, 1, tensor), p_dtype, aligned) + start
    value = tl.load(p + offsets, mask=inside).to(tl.float32)
    value = (1.0 - decay) * value - step * direction
    if seed is not None:
        tl.store(p + offsets, rounded_at_random(value, tl.load(seed), tensor, block, offsets), mask=inside)
    else:
        tl.store(p + offsets, value.to(p_dtype), mask=inside)


@triton.jit
def _factors(table, tensors, tensor, start, left, offsets):
    """What each element of a block is multiplied by: its row's factor times its column's."""
    rows, columns = entry(table, tensors, 5, tensor), entry(table, tensors, 6, tensor)
    width = entry(table, tensors, 7, tensor)
    first_row = start // width
    places = (start - first_row * width).to(tl.int32) + offsets  # from the beginning of the block's first row
    width = width.to(tl.int32)
    row = places // width
    of_rows = pointer(rows, tl.float32, False) + first_row
    of_columns = pointer(columns, tl.float32, False)
    return tl.load(of_rows + row, mask=offsets < tl.where(rows == 0, 0, left), other=1.0) * tl.load(
        of_columns + (places - row * width), mask=offsets < tl.where(columns == 0, 0, left), other=1.0
    )
