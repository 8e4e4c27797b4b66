"""bitsandbytes' update with an 8-bit momentum, which on CUDA is one kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sai.optim.codes import code_values
from hf_sai.optim.momentum import Momentum, QuantizedMomentum, has_bitsandbytes
from hf_sai.optim.update import Choice, Takes, is_ordinary

__all__ = ["offers", "update"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def offers(device: str, choice: Choice) -> Takes | None:
    """It takes what is dense, of 16- or 32-bit float dtypes, the momentum in 8 bits."""
    return functools.partial(_takes, rounding=choice.stochastic_rounding)


def _takes(p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor], rounding: bool) -> bool:
    if rounding and p.dtype == torch.bfloat16:
        return False
    if not (isinstance(m, QuantizedMomentum) and m.is_8bit and m.fits(p) and g.shape == p.shape):
        return False
    if not has_bitsandbytes():
        return False
    return p.is_contiguous() and is_ordinary(p) and p.dtype in _DTYPES


def update(params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize):
    """The step of :func:`hf_sai.sgd_sai`."""
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        p.mul_(1 - lr * weight_decay)
        _update_one(p, -g if maximize else g, m, float(lr * scale), momentum)


def _update_one(p: Tensor, g: Tensor, m: QuantizedMomentum, step: float, momentum: float) -> None:
    """m = momentum m + (1 - momentum) g, p = p - step m."""
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "momentum",
        g.to(p.dtype).contiguous(),
        p,
        m.codes,
        None,
        momentum,
        *(0.0, 0.0, 0.0, 0.0),  # what other optimizers use: beta2, beta3, alpha, eps
        2,  # in step 1 it would start the momentum at (1 - momentum) g
        step,
        code_values("8bit", p.device),
        None,
        m.scales,
        None,
        0.0,  # its weight decay is not decoupled
        1 - momentum,  # a factor of the gradient
        False,
    )
