"""What Triton's kernels share on the device: a table's entries, a momentum in codes, rounding at random."""

import triton
import triton.language as tl

__all__ = ["entry", "pointer", "read_4bit", "read_8bit", "rounded_at_random", "write_4bit", "write_8bit"]


@triton.jit
def entry(table, tensors, row: tl.constexpr, tensor):
    """One number of a table, which is int64[rows, tensors]."""
    return tl.load(table + row * tensors + tensor)


@triton.jit
def pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):
    """An address as a pointer; aligned ones are multiples of 16 bytes, so that accesses may be as wide."""
    p = address.to(tl.pointer_type(dtype), bitcast=True)
    return tl.multiple_of(p, 16) if aligned else p


# --- a momentum in codes: tiles of [blocks, elements that share a scale]


@triton.jit
def read_8bit(codes, values, offsets, inside):
    """What the codes stand for in units of their scales."""
    return tl.load(values + tl.load(codes + offsets, mask=inside).to(tl.int32))


@triton.jit
def read_4bit(codes, values, offsets, inside, blocks: tl.constexpr, per_scale: tl.constexpr):
    """The same, two to a byte, the first in the upper half; offsets and inside are those of bytes."""
    pair = tl.load(codes + offsets, mask=inside).to(tl.int32)
    both = tl.join(tl.load(values + (pair >> 4)), tl.load(values + (pair & 15)))
    return tl.reshape(both, [blocks, per_scale])


@triton.jit
def divided_by_largest(m):
    """Each block over its largest magnitude, and these; zeros stay, and NaN counts as the largest of all."""
    # As integers, whose maximum knows no NaN.
    largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    inverse = 1.0 / tl.where(largest == 0, 1.0, largest)
    return m * inverse[:, None], largest


@triton.jit
def nearest_codes(unit, nearest, midpoints):
    """The nearest code of numbers in [-1, 1]: the table's by a number's first 16 bits, or the next."""
    code = tl.load(nearest + (unit.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)).to(tl.int32)
    return code + (unit > tl.load(midpoints + code)).to(tl.int32)


@triton.jit
def write_8bit(codes, nearest, midpoints, m, offsets, inside):
    """Write a momentum's codes; returns the scale of each block."""
    unit, largest = divided_by_largest(m)
    tl.store(codes + offsets, nearest_codes(unit, nearest, midpoints).to(tl.uint8), mask=inside)
    return largest


@triton.jit
def write_4bit(codes, nearest, midpoints, m, offsets, inside, blocks: tl.constexpr, per_scale: tl.constexpr):
    """The same, two to a byte."""
    unit, largest = divided_by_largest(m)
    pairs = tl.reshape(nearest_codes(unit, nearest, midpoints), [blocks, per_scale // 2, 2])
    upper, lower = tl.split(pairs)
    tl.store(codes + offsets, (upper << 4 | lower).to(tl.uint8), mask=inside)
    return largest


# --- random numbers: a function of a seed, the tensor, its block and the place in it


@triton.jit
def _mixed(x):
    """One 32-bit number for another, with all bits mixed (the constants are Chris Wellons' lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounded_at_random(value, seed, tensor, block, offsets):
    """float32 to bfloat16, up with a probability of the distance from the lower neighbour; inf and NaN stay."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    tensor, block = tensor.to(tl.uint32), block.to(tl.uint32)
    first = _mixed(_mixed(_mixed(low) ^ tensor) ^ block)
    second = _mixed(_mixed(_mixed(high) ^ block) ^ tensor)
    random = _mixed(_mixed(offsets.to(tl.uint32) ^ first) ^ second) >> 16
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits >> 23) & 0xFF != 0xFF
    rounded = tl.where(finite, ((bits + random) >> 16) << 16, bits)
    return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
