"""What the codes of a quantised momentum stand for, and blocks of them written and read by torch's own operations.

The formats are bitsandbytes' dynamic 8-bit map (Dettmers et al., arXiv 2110.02861) and QLoRA's NormalFloat with 4 bits
(arXiv 2305.14314, appendix E), so that either package reads what the other wrote.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["QUANTIZED", "code_values", "dequantized", "midpoints", "quantized"]

#: Name of a quantised momentum -> elements that share a scale.
QUANTIZED = {"8bit": 256, "4bit": 128}

_NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def code_values(kind: str, device: torch.device) -> Tensor:
    """What each code stands for, ascending in [-1, 1]: float32[256] of ``"8bit"``, float32[16] of ``"4bit"``."""
    if kind == "4bit":
        return torch.tensor(_NORMAL_FLOAT, device=device)
    magnitudes = []
    for decade in range(7):  # 1e-7 to 1e-6 is one step, each further decade has twice as many
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        magnitudes.append((bounds[1:] + bounds[:-1]) / 2.0 * 10 ** (decade - 6))
    positive = torch.cat(magnitudes)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@functools.cache
def midpoints(kind: str, device: torch.device) -> Tensor:
    """float32, between each code's value and the next; after the last, infinity."""
    values = code_values(kind, device)
    return torch.cat([(values[1:] + values[:-1]) / 2, values.new_tensor([torch.inf])])


def quantized(value: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (uint8, flat; two to a byte in 4 bits, the first in the upper half) and scales (float32) of a value."""
    flat = value.float().flatten()
    size, per_scale = flat.numel(), QUANTIZED[kind]
    blocks = torch.nn.functional.pad(flat, (0, -size % per_scale)).view(-1, per_scale)
    scales = blocks.abs().amax(1)
    unit = torch.where(scales > 0, 1 / scales, 0).unsqueeze(1) * blocks
    codes = torch.bucketize(unit, midpoints(kind, value.device)[:-1]).to(torch.uint8).flatten()[:size]
    return (codes if kind == "8bit" else codes[::2] << 4 | codes[1::2]), scales


def dequantized(codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """What codes and scales stand for, float32, flat."""
    codes = codes.flatten()
    if kind == "4bit":
        codes = torch.stack([codes >> 4, codes & 15], 1).flatten()
    values = code_values(kind, codes.device)[codes.int()]
    return values * scales.repeat_interleave(QUANTIZED[kind])[: len(values)]
