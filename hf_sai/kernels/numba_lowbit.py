"""One pass over CPU memory a step for float32 parameters whose momentum is kept in bfloat16, 8 or 4 bits, by numba.

The formats are those of :mod:`hf_sai.optim.momentum`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sai.kernels import numba_loops
from hf_sai.kernels.numba_plain import addresses, coefficients, in_shares, is_dense
from hf_sai.optim.codes import code_values
from hf_sai.optim.momentum import Momentum
from hf_sai.optim.update import is_ordinary

__all__ = ["can_update", "nearest_code_tables", "update"]

#: Every block's size divides it, so that no two threads share one.
_ALIGNMENT = 256

_LOOPS: dict[str, Callable[..., None]] = {
    "bfloat16": numba_loops.step_bfloat16,
    "8bit": numba_loops.step_8bit,
    "4bit": numba_loops.step_4bit,
}


def can_update(p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor] = ()) -> bool:
    """Whether the loops take these: dense, float32 with a float32 gradient; not for subclasses of Tensor."""
    if m is None or p.dtype != torch.float32 or not is_ordinary(p) or not is_dense(p, p) or not is_dense(g, p):
        return False
    if isinstance(m, Tensor):
        return is_dense(m, p, torch.bfloat16)
    return m.fits(p) and m.codes.is_contiguous() and m.scales.is_contiguous() and m.codes.is_cpu and m.scales.is_cpu


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Momentum],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    ahead: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts."""
    of_kind: dict[str, list[int]] = defaultdict(list)
    for index, m in enumerate(momentum_buffers):
        of_kind["bfloat16" if isinstance(m, Tensor) else "8bit" if m.is_8bit else "4bit"].append(index)
    for kind, indices in of_kind.items():
        own: Any = [momentum_buffers[i] for i in indices]
        kept = [own] if kind == "bfloat16" else [[m.codes for m in own], [m.scales for m in own]]
        table = addresses([params[i] for i in indices], [grads[i] for i in indices], *kept)
        sign = -1.0 if maximize else 1.0
        numbers = coefficients(np.float32, [scales[i] for i in indices], lr, momentum, ahead, weight_decay, sign)
        loop = functools.partial(_LOOPS[kind], table, numbers)
        codes: Any = () if kind == "bfloat16" else nearest_code_tables(kind)
        in_shares([params[i].numel() for i in indices], lambda share: loop(share, *codes), _ALIGNMENT)  # noqa: B023


@functools.cache
def nearest_code_tables(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For ``"8bit"`` or ``"4bit"``: what each code stands for, and how the nearest code of a value in [-1, 1] is found.

    Returns:
        values: float32, ascending.
        nearest: uint8[65536]: the nearest code of the least number whose float32 begins with these 16 bits. Of all that
            begin so at most one is a midpoint, so that the nearest code of each is this one or the next.
        midpoints: float32, between each code and the next; after the last, infinity.
    """
    values = code_values(kind, torch.device("cpu")).numpy()
    assert (np.diff(values) > 0).all(), "codes are expected in ascending order"
    midpoints = np.append((values[1:] + values[:-1]) / 2, np.float32(np.inf)).astype(np.float32)
    bits = np.arange(65536, dtype=np.uint32) << 16
    bits[32768:] |= 0xFFFF  # of negative numbers the least has the most bits
    with np.errstate(invalid="ignore"):
        nearest = np.searchsorted(midpoints[:-1], bits.view(np.float32), side="left")
    return values, np.minimum(nearest, len(values) - 1).astype(np.uint8), midpoints
