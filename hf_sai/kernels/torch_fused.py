"""torch's fused SGD kernel as an SGD-SaI step, for tensors that no kernel of ours takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sai.optim.momentum import Momentum
from hf_sai.optim.update import Choice, Takes, is_ordinary

__all__ = ["offers", "update"]

# What torch's fused SGD kernel updates rightly. On CPU it takes bfloat16 and float16 too, but up to torch 2.13 returns
# wrong values for 32 elements or more (seen: torch.optim.SGD(fused=True) differs there from fused=False).
_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}


def offers(device: str, choice: Choice) -> Takes | None:
    """It takes what it updates rightly: contiguous, of one dtype that it handles, no subclass of Tensor."""
    if device not in _DTYPES or (choice.automatic and (device != "cpu" or choice.traced)):
        return None  # torch's multi-tensor operations
    return functools.partial(_takes, dtypes=_DTYPES[device], rounding=choice.stochastic_rounding)


def _takes(
    p: Tensor,
    g: Tensor,
    m: Momentum | None,
    factors: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    rounding: bool,
) -> bool:
    if rounding and p.dtype == torch.bfloat16:
        return False
    if m is not None and not (
        isinstance(m, Tensor) and m.dtype == p.dtype and m.is_contiguous() and m.shape == p.shape
    ):
        return False
    return is_ordinary(p) and p.is_contiguous() and p.dtype in dtypes and g.shape == p.shape


def update(params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize, grad_scale, found_inf):
    """The step of :func:`hf_sai.sgd_sai`; the kernel unscales the gradients and skips on inf by itself.

    Its own decay is not decoupled: it adds weight_decay * p to the gradient, before the momentum. Without a momentum
    that is a decoupled decay of lr * weight_decay, so the kernel is given the finished momentum as its gradient: six
    passes over memory. Where only the kernel may touch the momentum, the decay is a pass of its own, the seventh.
    """
    decay = 1 - lr * weight_decay
    if found_inf is not None:  # stays on the device: no synchronisation
        decay = torch.where(found_inf > 0, torch.ones_like(found_inf), decay)
    in_kernel = momentum != 0 and (maximize or grad_scale is not None or found_inf is not None)
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        if g.dtype != p.dtype or not g.is_contiguous():
            g = g.to(p.dtype).contiguous()
        apart = in_kernel or scale == 0
        if apart:
            p.mul_(decay)
        elif momentum != 0:
            g = m.lerp_(g, 1 - momentum)
        mu = momentum if apart else 0.0
        torch._fused_sgd_(
            [p],
            [g],
            [m] if mu != 0 else [],
            lr=lr * scale,
            momentum=mu,
            dampening=mu,
            weight_decay=0.0 if apart else weight_decay / scale,
            nesterov=False,
            maximize=maximize,
            is_first_step=False,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
