"""One SGD-SaI update of a list of tensors: the plain, the multi-tensor, the fused and the widened path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sai.momentum import QuantizedMomentum, codes_table

__all__ = ["can_fuse", "sgd_sai"]

# What torch's fused SGD kernel updates rightly. On CPU it takes bfloat16 and float16 too, but up to torch 2.13 returns
# wrong values for 32 elements or more (seen: torch.optim.SGD(fused=True) differs there from fused=False).
_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}


def sgd_sai(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | QuantizedMomentum | None],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    maximize: bool = False,
    stochastic_rounding: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Update ``params`` and ``momentum_buffers`` in place by one step (arXiv 2412.11768, Algorithm 1, lines 10 to 16).

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \qquad
        \theta \leftarrow (1 - \gamma\lambda) \theta - \gamma\, G\, m

    The first step's rule :math:`m_1 = g_1` needs no case of its own: a buffer that starts at the gradient stays there
    (exactly in the plain and the multi-tensor path, to rounding in the fused one).

    Args:
        params: Tensors :math:`\theta` of any shapes.
        grads: Their gradients :math:`g`, same shapes.
        momentum_buffers: :math:`m`, same shapes as ``params``, of any float dtype, or quantised; entries are ignored
            (None) if momentum is 0. Where dtypes differ the update is computed in float32 or better, one tensor at a
            time, whatever ``foreach`` and ``fused`` say.
        scales: One factor :math:`G` per tensor: its g-SNR, normalised or not.
        lr: Learning rate :math:`\gamma`, a float or a one-element tensor.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda` >= 0.
        maximize: Negate the gradients.
        stochastic_rounding: Compute in float32 and round bfloat16 parameters up or down at random, so that updates
            below their resolution count on average. Other dtypes are not affected.
        foreach: Use torch's multi-tensor operations. With both ``foreach`` and ``fused`` None: on CUDA.
        fused: Use torch's fused SGD kernel for the tensors that it can update (:func:`can_fuse`). With both None: on
            CPU.
        grad_scale: GradScaler's scale, by which the gradients are still multiplied (``fused`` only).
        found_inf: GradScaler's flag, 1.0 to skip the update (``fused`` only).

    Example:
        >>> import torch
        >>> theta, m = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> sgd_sai([theta], [torch.ones(2)], [m], [2.0], lr=0.25, momentum=0.5, weight_decay=0.0)
        >>> theta
        tensor([0.5000, 1.5000])
    """
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
    lists = (params, grads, momentum_buffers, scales)
    wide = [i for i in range(len(params)) if _is_widened(params[i], momentum_buffers[i], stochastic_rounding)]
    if wide:
        _widened(*_take(lists, wide), **options, stochastic_rounding=stochastic_rounding, fused=fused)
        params, grads, momentum_buffers, scales = _take(lists, sorted(set(range(len(params))) - set(wide)))
    if not params:
        return
    if foreach is None and fused is None:
        foreach = all(p.is_cuda and _is_plain(p) for p in params)
        fused = any(p.is_cpu for p in params)
    if fused:
        _fused(params, grads, momentum_buffers, scales, **options, grad_scale=grad_scale, found_inf=found_inf)
    elif foreach:
        _multi_tensor(params, grads, momentum_buffers, scales, **options)
    else:
        _single_tensor(params, grads, momentum_buffers, scales, **options)


def can_fuse(param: Tensor) -> bool:
    """Whether torch's fused SGD kernel updates this parameter rightly: contiguous, a dtype it handles, no DTensor."""
    return _is_plain(param) and param.is_contiguous() and param.dtype in _FUSED_DTYPES.get(param.device.type, ())


def _is_plain(param: Tensor) -> bool:
    """Whether this is an ordinary tensor, not a subclass such as DTensor."""
    return type(param) in (Tensor, torch.nn.Parameter)


def _is_widened(param: Tensor, momentum: Tensor | QuantizedMomentum | None, stochastic_rounding: bool) -> bool:
    """Whether this tensor's update is computed in another dtype than the parameter's."""
    if stochastic_rounding and param.dtype == torch.bfloat16:
        return True
    return isinstance(momentum, QuantizedMomentum) or (momentum is not None and momentum.dtype != param.dtype)


def _take(lists: Sequence[Sequence], indices: Sequence[int]) -> Iterator[list]:
    return ([values[i] for i in indices] for values in lists)


def _single_tensor(params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize):
    """The plain path, which the others must equal to rounding."""
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        # --- gradient
        direction = (-g if maximize else g).to(p.dtype)
        # --- momentum
        if momentum != 0:
            direction = m.lerp_(direction, 1 - momentum)
        # --- decoupled weight decay
        if weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        # --- scaled step
        if isinstance(lr, Tensor):
            p.addcmul_(direction, (lr * scale).to(p), value=-1)
        else:
            p.add_(direction, alpha=-lr * scale)


def _multi_tensor(params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize):
    """The same through torch's multi-tensor operations: few kernel launches for many tensors."""
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for index, (p, g) in enumerate(zip(params, grads, strict=True)):
        buckets[p.device, p.dtype, g.dtype].append(index)
    for (_, dtype, _), indices in buckets.items():
        bucket = [params[i] for i in indices]
        # --- gradient
        directions = [grads[i].to(dtype) for i in indices]
        if maximize:
            directions = list(torch._foreach_neg(directions))
        # --- momentum
        if momentum != 0:
            buffers = [momentum_buffers[i] for i in indices]
            torch._foreach_lerp_(buffers, directions, 1 - momentum)
            directions = buffers
        # --- decoupled weight decay
        if weight_decay != 0:
            torch._foreach_mul_(bucket, 1 - lr * weight_decay)
        # --- scaled step
        if isinstance(lr, Tensor):
            steps = torch._foreach_mul(directions, [scales[i] for i in indices])
            torch._foreach_mul_(steps, lr)
        else:
            steps = torch._foreach_mul(directions, [lr * scales[i] for i in indices])
        torch._foreach_sub_(bucket, steps)


def _fused(params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize, grad_scale, found_inf):
    """The same through torch's fused SGD kernel, which unscales the gradients and skips on inf by itself.

    The kernel walks memory in order whatever the strides, so tensors that it would misread take the plain path.
    """
    plain = [i for i, p in enumerate(params) if not can_fuse(p)]
    if plain:
        if grad_scale is not None or found_inf is not None:
            raise ValueError(
                "grad_scale and found_inf need parameters that can_fuse() accepts; unscale the gradients before."
            )
        rest = [i for i, p in enumerate(params) if can_fuse(p)]
        lists = (params, grads, momentum_buffers, scales)
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        _single_tensor(*_take(lists, plain), **options)
        params, grads, momentum_buffers, scales = _take(lists, rest)

    decay = 1 - lr * weight_decay
    if found_inf is not None:  # stays on the device: no synchronisation
        decay = torch.where(found_inf > 0, torch.ones_like(found_inf), decay)
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        if weight_decay != 0:
            p.mul_(decay)
        if g.dtype != p.dtype or not g.is_contiguous():
            g = g.to(p.dtype).contiguous()
        torch._fused_sgd_(
            [p],
            [g],
            [] if momentum == 0 else [m],
            lr=lr * scale,
            momentum=momentum,
            dampening=momentum,
            weight_decay=0.0,
            nesterov=False,
            maximize=maximize,
            is_first_step=False,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )


def _widened(
    params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize, stochastic_rounding, fused
):
    """The plain path in float32 or better, for a momentum of another dtype and for stochastic rounding."""
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        decay, step = 1 - lr * weight_decay, lr * scale
        if fused is not False and momentum != 0 and _has_8bit_kernel(p, m) and not stochastic_rounding:
            p.mul_(decay)
            _8bit_kernel(p, -g if maximize else g, m, float(step), momentum)
            continue
        wide = torch.promote_types(p.dtype, torch.float32)
        # --- gradient
        direction = (-g if maximize else g).to(wide)
        # --- momentum
        if momentum != 0:
            loaded = m.load() if isinstance(m, QuantizedMomentum) else m
            direction = loaded.to(wide).lerp(direction, 1 - momentum)
            m.store(direction) if isinstance(m, QuantizedMomentum) else m.copy_(direction)
        # --- decoupled weight decay and scaled step
        updated = p.to(wide) * decay - step * direction
        p.copy_(_stochastically_rounded(updated) if stochastic_rounding and p.dtype == torch.bfloat16 else updated)


def _has_8bit_kernel(p: Tensor, m: Tensor | QuantizedMomentum | None) -> bool:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return isinstance(m, QuantizedMomentum) and m.is_8bit and p.is_contiguous() and _is_plain(p) and p.dtype in dtypes


def _8bit_kernel(p: Tensor, g: Tensor, m: QuantizedMomentum, step: float, momentum: float) -> None:
    """bitsandbytes' update with an 8-bit momentum, which on CUDA is one kernel: m = momentum m + (1 - momentum) g."""
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
        codes_table(p.device),
        None,
        m.scales,
        None,
        0.0,  # its weight decay is not decoupled
        1 - momentum,  # a factor of the gradient
        False,
    )


def _stochastically_rounded(value: Tensor) -> Tensor:
    """float32 to bfloat16, up with a probability of the distance from the lower neighbour; inf and NaN stay."""
    bits = value.view(torch.int32)
    rounded = (bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)
    return torch.where(value.isfinite(), rounded.view(torch.float32), value).to(torch.bfloat16)
