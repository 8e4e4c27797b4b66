"""One pass over CPU memory a step for float32 parameters whose momentum is kept in bfloat16, 8 or 4 bits, by numba.

Block by block: the momentum is read, parameter and momentum are updated in float32, and the momentum is written again,
with the block's new scale where it has one. The formats are those of :mod:`hf_sai.optim.momentum`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_sai.kernels.numba_kernel import coefficients, in_shares, jit, momentum_step
from hf_sai.optim.momentum import QUANTIZED, QuantizedMomentum, codes_table

__all__ = ["can_update", "nearest_code_tables", "update"]

_BLOCKS = {"bfloat16": 256, **QUANTIZED}

#: Every block's size divides it, so that no two threads share one.
_ALIGNMENT = 256


def can_update(p: Tensor, g: Tensor, m: Tensor | QuantizedMomentum | None) -> bool:
    """Whether the kernels take these: dense, float32 with a float32 gradient; not for subclasses of Tensor."""
    if isinstance(m, Tensor):
        if m.dtype != torch.bfloat16 or not m.is_contiguous():
            return False
    elif m is None:
        return False
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (p, g))


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | QuantizedMomentum],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts."""
    lr = float(lr)
    work = []
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        arrays = [t.detach().view(-1).numpy() for t in (p, g)]
        numbers = coefficients(arrays[0].dtype, scale, lr, momentum, weight_decay, -1.0 if maximize else 1.0)
        work.append((arrays, _Buffer(m), numbers))

    def run(index: int, start: int, stop: int) -> None:
        arrays, buffer, numbers = work[index]
        scratch = np.empty(_BLOCKS[buffer.kind], dtype=np.float32)
        own = [array[start:stop] for array in arrays]
        _KERNELS[buffer.kind](*own, *buffer.part(start, stop), *numbers, scratch, scratch.view(np.uint32))

    in_shares([p.numel() for p in params], run, _ALIGNMENT)


class _Buffer:
    """A momentum as the arrays that its kernel takes."""

    def __init__(self, m: Tensor | QuantizedMomentum) -> None:
        if isinstance(m, Tensor):
            self.kind, self.codes, self.per_code = "bfloat16", m.view(torch.uint16).view(-1).numpy(), 1
        else:
            self.kind, self.per_code = ("8bit", 1) if m.is_8bit else ("4bit", 2)
            self.codes, self.scales = m.codes.view(-1).numpy(), m.scales.numpy()

    def part(self, start: int, stop: int) -> list[np.ndarray]:
        """For these elements, of which the first begins a block: codes, and if there are, scales and tables."""
        codes = self.codes[start // self.per_code : -(-stop // self.per_code)]
        if self.kind == "bfloat16":
            return [codes]
        block = _BLOCKS[self.kind]
        return [codes, self.scales[start // block : -(-stop // block)], *nearest_code_tables(self.kind)]


@functools.cache
def nearest_code_tables(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For ``"8bit"`` or ``"4bit"``: what each code stands for, and how the nearest code of a value in [-1, 1] is found.

    Returns:
        values: float32, ascending.
        first: uint8[65536]: the nearest code of the least number whose float32 begins with these 16 bits. Of all that
            begin so at most one is a midpoint, so that the nearest code of each is this one or the next.
        midpoints: float32, between each code and the next; after the last, infinity.
    """
    if kind == "8bit":
        values = codes_table(torch.device("cpu")).numpy()
    else:
        from bitsandbytes import functional

        values = functional.get_4bit_type("nf4", device="cpu", blocksize=QUANTIZED["4bit"]).numpy()
    values = values.astype(np.float32)
    assert (np.diff(values) > 0).all(), "codes are expected in ascending order"
    midpoints = np.append((values[1:] + values[:-1]) / 2, np.float32(np.inf)).astype(np.float32)
    bits = np.arange(65536, dtype=np.uint32) << 16
    bits[32768:] |= 0xFFFF  # of negative numbers the least has the most bits
    with np.errstate(invalid="ignore"):
        first = np.searchsorted(midpoints[:-1], bits.view(np.float32), side="left")
    return values, np.minimum(first, len(values) - 1).astype(np.uint8), midpoints


# Each loop is a function of its own, over slices: then LLVM sees that it can work on many elements at a time.


@jit
def _step_bfloat16(p, g, codes, decay, step, sign, weight, scratch, bits):
    for start in range(0, p.size, scratch.size):
        stop = min(start + scratch.size, p.size)
        mine, m = codes[start:stop], scratch[: stop - start]
        _widen(mine, bits)
        momentum_step(p[start:stop], g[start:stop], m, decay, step, sign, weight)
        _narrow(mine, bits)


@jit
def _step_8bit(p, g, codes, scales, values, first, midpoints, decay, step, sign, weight, scratch, bits):
    for block in range(scales.size):
        start = block * scratch.size
        stop = min(start + scratch.size, p.size)
        mine, m = codes[start:stop], scratch[: stop - start]
        _read_8bit(mine, values, scales[block], m)
        momentum_step(p[start:stop], g[start:stop], m, decay, step, sign, weight)
        scales[block] = _divide_by_largest(m, bits)
        _write_8bit(mine, first, midpoints, m, bits)


@jit
def _step_4bit(p, g, codes, scales, values, first, midpoints, decay, step, sign, weight, scratch, bits):
    for block in range(scales.size):
        start = block * scratch.size
        stop = min(start + scratch.size, p.size)
        mine, m = codes[start // 2 : stop // 2], scratch[: stop - start]
        _read_4bit(mine, values, scales[block], m)
        momentum_step(p[start:stop], g[start:stop], m, decay, step, sign, weight)
        scales[block] = _divide_by_largest(m, bits)
        _write_4bit(mine, first, midpoints, m, bits)


@jit
def _divide_by_largest(m, bits):
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
def _write_8bit(codes, first, midpoints, m, bits):
    for i in range(codes.size):
        code = first[bits[i] >> np.uint32(16)]
        codes[i] = code + (m[i] > midpoints[code])


@jit
def _read_4bit(codes, values, scale, m):
    for i in range(codes.size):  # two to a byte, the first in the upper half
        m[2 * i] = values[codes[i] >> 4] * scale
        m[2 * i + 1] = values[codes[i] & 15] * scale


@jit
def _write_4bit(codes, first, midpoints, m, bits):
    for i in range(codes.size):
        upper, lower = first[bits[2 * i] >> np.uint32(16)], first[bits[2 * i + 1] >> np.uint32(16)]
        upper += m[2 * i] > midpoints[upper]
        lower += m[2 * i + 1] > midpoints[lower]
        codes[i] = upper << 4 | lower


_KERNELS: dict[str, Callable[..., None]] = {"bfloat16": _step_bfloat16, "8bit": _step_8bit, "4bit": _step_4bit}
