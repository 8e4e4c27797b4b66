"""One SGD-SaI update of a list of tensors: the plain, the multi-tensor, the fused and the widened path.

The fused path is a compiled kernel of `numba_kernel.py` or `triton_kernel.py` where it can be, else torch's SGD kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from hf_sai.kernels.compiled import compiled_module, wants_compiled
from hf_sai.optim.momentum import QuantizedMomentum, codes_table

__all__ = ["can_fuse", "sgd_sai"]

# What torch's fused SGD kernel updates rightly. On CPU it takes bfloat16 and float16 too, but up to torch 2.13 returns
# wrong values for 32 elements or more (seen: torch.optim.SGD(fused=True) differs there from fused=False).
_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}

# Kernels that make the whole step, decay included, in one pass over memory.
_ONE_PASS_KERNELS = {"cpu": "hf_sai.kernels.numba_kernel", "cuda": "hf_sai.kernels.triton_kernel"}


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
    grad_factors: Sequence[tuple[Tensor, ...]] | None = None,
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
            (None) if momentum is 0. Where dtypes differ the update is computed in float32 or better, by numba (CPU,
            float32 parameters) or Triton where they are used, else one tensor at a time.
        scales: One factor :math:`G` per tensor: its g-SNR, normalised or not.
        lr: Learning rate :math:`\gamma`, a float or a one-element tensor.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda` >= 0.
        maximize: Negate the gradients.
        stochastic_rounding: Compute in float32 and round bfloat16 parameters up or down at random, so that updates
            below their resolution count on average. Other dtypes are not affected.
        grad_factors: For each tensor what its gradient is to be multiplied by before all else, one after the other (see
            :func:`hf_sai.optim.gradient_norm.gradient_factors`); None or nothing for 1. Unless numba's kernel does it, the
            gradient is changed in place.
        foreach: Use torch's multi-tensor operations.
        fused: Use numba's (CPU) or Triton's (CUDA) kernel where it is installed and takes the tensor, else torch's
            fused SGD kernel where that does (:func:`can_fuse`), else the plain loop. With both ``foreach`` and
            ``fused`` None: on CPU; CUDA takes ``foreach`` then, sharded tensors the plain loop. Within
            ``torch.compile``, which fuses by itself, and while a CUDA graph is captured, no other compiler's kernel
            is used.
        grad_scale: GradScaler's scale, by which the gradients are still multiplied (``fused`` only).
        found_inf: GradScaler's flag, 1.0 to skip the update (``fused`` only).

    Raises:
        ValueError: ``grad_scale`` or ``found_inf`` is given for tensors that no fused kernel takes.

    Example:
        >>> import torch
        >>> theta, m = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> sgd_sai([theta], [torch.ones(2)], [m], [2.0], lr=0.25, momentum=0.5, weight_decay=0.0)
        >>> theta
        tensor([0.5000, 1.5000])
    """
    compiled = wants_compiled(params, foreach, fused)
    grad_factors = grad_factors or [()] * len(params)
    paths: dict[Callable, list[int]] = defaultdict(list)
    for i, (p, g, m, factors) in enumerate(zip(params, grads, momentum_buffers, grad_factors, strict=True)):
        m = None if momentum == 0 else m
        if factors and compiled and _has_kernel("hf_sai.kernels.numba_factored", p, g, m):
            path: Callable = _factored
        else:
            for factor in factors:
                g.mul_(factor)
            path = _path(p, g, m, stochastic_rounding, foreach, fused, compiled)
        paths[path].append(i)

    of_amp = {"grad_scale": grad_scale, "found_inf": found_inf}
    not_fused = {_single_tensor, _multi_tensor, _widened, _factored, _low_bit}
    if not_fused & paths.keys() and any(value is not None for value in of_amp.values()):
        raise ValueError(
            "grad_scale and found_inf need tensors that a fused kernel takes; unscale the gradients before."
        )
    for path, indices in paths.items():
        extra: dict[str, Any] = {} if path in not_fused else of_amp
        if path is _widened:
            extra = {"stochastic_rounding": stochastic_rounding, "fused": foreach is None if fused is None else fused}
        elif path is _factored:
            extra = {"grad_factors": [grad_factors[i] for i in indices]}
        taken = _take((params, grads, momentum_buffers, scales), indices)
        path(*taken, lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize, **extra)


def can_fuse(param: Tensor) -> bool:
    """Whether torch's fused SGD kernel updates this parameter rightly: contiguous, a dtype it handles, no DTensor."""
    return _is_plain(param) and param.is_contiguous() and param.dtype in _FUSED_DTYPES.get(param.device.type, ())


def _is_plain(param: Tensor) -> bool:
    """Whether this is an ordinary tensor, not a subclass such as DTensor."""
    return type(param) in (Tensor, torch.nn.Parameter)


def _path(
    p: Tensor,
    g: Tensor,
    m: Tensor | QuantizedMomentum | None,
    stochastic_rounding: bool,
    foreach: bool | None,
    fused: bool | None,
    compiled: bool,
) -> Callable:
    """The function below, or the kernel, that updates this tensor."""
    automatic = foreach is None and fused is None
    is_low_bit = isinstance(m, QuantizedMomentum) or (m is not None and m.dtype != p.dtype)
    if is_low_bit and (fused or automatic) and _has_kernel("hf_sai.kernels.numba_lowbit", p, g, m):
        return _low_bit
    if isinstance(m, QuantizedMomentum) or (stochastic_rounding and p.dtype == torch.bfloat16):
        return _widened
    if compiled and (fused or p.is_cpu):
        kernel = _one_pass_kernel(p.device.type)
        if kernel is not None and _is_plain(p) and kernel.can_update(p, g, m):
            return kernel.update
    if m is not None and m.dtype != p.dtype:
        return _widened
    if automatic:
        fused = p.is_cpu and not torch.compiler.is_compiling()
        foreach = not fused and _is_plain(p)
    if fused and can_fuse(p) and (m is None or m.is_contiguous()):
        return _torch_kernel
    return _multi_tensor if foreach else _single_tensor


def _one_pass_kernel(device_type: str) -> ModuleType | None:
    """The module of this device's one-pass kernel, None where there is none or it cannot be used now."""
    if device_type not in _ONE_PASS_KERNELS:
        return None
    if device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # Triton's table of addresses is made anew each step, and a replayed graph would not see it
    return compiled_module(_ONE_PASS_KERNELS[device_type])


def _has_kernel(name: str, p: Tensor, g: Tensor, m: Tensor | QuantizedMomentum | None) -> bool:
    """Whether this module of numba's kernels updates the tensor."""
    kernel = compiled_module(name) if p.is_cpu and _is_plain(p) else None
    return kernel is not None and kernel.can_update(p, g, m)


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


def _torch_kernel(
    params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize, grad_scale, found_inf
):
    """The same through torch's fused SGD kernel, which unscales the gradients and skips on inf by itself.

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


def _factored(params, grads, momentum_buffers, scales, **options):
    """Normalisation and step in one pass over CPU memory."""
    cast(ModuleType, compiled_module("hf_sai.kernels.numba_factored")).update(
        params, grads, momentum_buffers, scales, **options
    )


def _low_bit(params, grads, momentum_buffers, scales, **options):
    """One pass over CPU memory for a momentum in fewer bits."""
    cast(ModuleType, compiled_module("hf_sai.kernels.numba_lowbit")).update(
        params, grads, momentum_buffers, scales, **options
    )


def _widened(
    params, grads, momentum_buffers, scales, *, lr, momentum, weight_decay, maximize, stochastic_rounding, fused
):
    """In float32 or better: a momentum of another dtype, stochastic rounding."""
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        decay, step = 1 - lr * weight_decay, lr * scale
        if fused and momentum != 0 and _has_8bit_kernel(p, m) and not stochastic_rounding:
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
