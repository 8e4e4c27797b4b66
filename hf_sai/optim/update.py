"""One update of a list of tensors, plainly and by torch's multi-tensor operations: the definition of the algorithm.

Faster kernels of the same update register themselves here and must equal the plain loop to rounding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sai.optim.layout import ORDINARY
from hf_sai.optim.momentum import QUANTIZED, Momentum, QuantizedMomentum, load, store
from hf_sai.optim.stochastic import stochastically_rounded

__all__ = ["KERNELS", "Choice", "Kernel", "Takes", "can_unscale", "is_ordinary", "multiplied", "sgd_sai"]


@dataclass(frozen=True)
class Choice:
    """What decides, beside the tensors themselves, which path updates them."""

    foreach: bool | None
    fused: bool | None
    stochastic_rounding: bool = False
    nesterov: bool = False
    traced: bool = False  # by torch.compile, which fuses by itself and must see torch's own operations

    @property
    def kernels(self) -> bool:
        """Whether kernels are asked for, or nothing is said."""
        return bool(self.fused) or self.automatic

    @property
    def automatic(self) -> bool:
        return self.foreach is None and self.fused is None

    def together(self, p: Tensor) -> bool:
        """Whether torch's multi-tensor operations update this parameter, where no kernel does."""
        return bool(is_ordinary(p) and (not p.is_cpu or self.traced) if self.automatic else self.foreach)


#: Whether a kernel updates a parameter with this gradient, momentum or None, and factors of the gradient.
Takes = Callable[[Tensor, Tensor, Momentum | None, Sequence[Tensor]], bool]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A way to make the update: one of those at this file's end, or a faster one.

    Attributes:
        name: For messages and tests.
        offers: Asked once a step with a type of device and the choice; what is asked for each tensor there then, or
            None where the kernel takes none.
        update: Called with lists and options as the functions below are.
        unscales: Whether it takes ``grad_scale`` and ``found_inf``, too.
        multiplies: It is for gradients with factors: takes ``grad_factors``, too, and leaves the gradient as it is.
        rounds: Whether it takes ``stochastic_rounding``, too.
        looks_ahead: Whether it takes ``ahead``, too: the gradient's weight in what the step goes along, beside the old
            momentum. It is that in the momentum, 1 - mu, or with Nesterov's 1 - mu^2.
    """

    name: str
    offers: Callable[[str, Choice], Takes | None]
    update: Callable[..., None]
    unscales: bool = False
    multiplies: bool = False
    rounds: bool = False
    looks_ahead: bool = False

    def takes(self, p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor], choice: Choice) -> bool:
        """Whether it updates these."""
        takes = self.asked(p.device.type, choice)
        return takes is not None and takes(p, g, m, factors)

    def asked(self, device: str, choice: Choice) -> Takes | None:
        """What it offers, if it can do what is chosen."""
        return self.offers(device, choice) if self.looks_ahead or not choice.nesterov else None


# Elements of a piece of a tensor that is updated with temporary copies.
_PIECE = 1 << 22

# Pieces begin at its multiples: every quantised block's size divides it.
_BLOCK = max(QUANTIZED.values())

#: Asked in this order; filled by :mod:`hf_sai.kernels`.
KERNELS: list[Kernel] = []


def sgd_sai(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Momentum | None],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool = False,
    weight_decay: float,
    maximize: bool = False,
    stochastic_rounding: bool = False,
    grad_factors: Sequence[Sequence[Tensor]] | None = None,
    foreach: bool | None = None,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""Update ``params`` and ``momentum_buffers`` in place by one step (arXiv 2412.11768, Algorithm 1, lines 10 to 16).

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \qquad
        \theta \leftarrow (1 - \gamma\lambda) \theta - \gamma\, G\, m

    With ``nesterov`` the step goes along :math:`\mu m + (1 - \mu) g` of the new momentum, the one that follows if the
    next gradient is this one.

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
        nesterov: Step along the momentum a step ahead; without a momentum nothing else.
        weight_decay: :math:`\lambda` >= 0.
        maximize: Negate the gradients.
        stochastic_rounding: Compute in float32 and round bfloat16 parameters up or down at random, so that updates
            below their resolution count on average. Other dtypes are not affected.
        grad_factors: For each tensor what its gradient is to be multiplied by before all else, one after the other (see
            :meth:`hf_sai.optim.rules.published.Published.factors`); None or nothing for 1. Unless a kernel does it, the
            gradient is changed in place.
        foreach: Use torch's multi-tensor operations.
        fused: Use the kernels that :mod:`hf_sai.kernels` knows, where one takes the tensor, else the plain loop. With
            both ``foreach`` and ``fused`` None: on CPU; CUDA takes ``foreach`` then.
        grad_scale: GradScaler's scale, by which the gradients are still multiplied (``fused`` only).
        found_inf: GradScaler's flag, 1.0 to skip the update (``fused`` only).

    Raises:
        ValueError: Shapes differ, or ``grad_scale`` or ``found_inf`` is given for tensors that no fused kernel takes.

    Example:
        >>> import torch
        >>> theta, m = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> sgd_sai([theta], [torch.ones(2)], [m], [2.0], lr=0.25, momentum=0.5, weight_decay=0.0)
        >>> theta
        tensor([0.5000, 1.5000])
    """
    nesterov = nesterov and momentum != 0
    choice = Choice(foreach, fused, stochastic_rounding, nesterov, torch.compiler.is_compiling())
    ahead = 1 - (momentum**2 if nesterov else momentum)
    all_factors = grad_factors or [()] * len(params)
    by_device: dict[torch.device, tuple[list[tuple[Kernel, Takes]], dict[Kernel, list[int]]]] = {}
    for i, (p, g, m, factors) in enumerate(zip(params, grads, momentum_buffers, all_factors, strict=True)):
        device = p.device
        if device not in by_device:
            by_device[device] = _offers(device, choice), defaultdict(list)
        offers, by_path = by_device[device]
        by_path[_path(p, g, None if momentum == 0 else m, factors, choice, offers)].append(i)
    buckets = [(path, device, own) for device, (_, by_path) in by_device.items() for path, own in by_path.items()]
    unscaling = {"grad_scale": grad_scale, "found_inf": found_inf}
    if any(value is not None for value in unscaling.values()) and not all(path.unscales for path, *_ in buckets):
        raise ValueError(
            "grad_scale and found_inf need tensors that a fused kernel takes; unscale the gradients before."
        )
    for path, device, indices in buckets:
        lists: list[Any] = [params, grads, momentum_buffers, scales, all_factors]
        if len(indices) < len(params):
            lists = [[of[i] for i in indices] for of in lists]
        own_params, own_grads, own_momenta, own_scales, own_factors = lists
        extra: dict[str, Any] = {}
        if path.unscales:
            extra |= {key: _on(value, device) for key, value in unscaling.items()}
        if path.rounds:
            extra["stochastic_rounding"] = stochastic_rounding
        if path.looks_ahead:
            extra["ahead"] = ahead
        if path.multiplies:
            extra["grad_factors"] = own_factors
        else:
            own_grads = [multiplied(g, factors) for g, factors in zip(own_grads, own_factors, strict=True)]
        options = {"lr": _rate_on(lr, device), "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        path.update(own_params, own_grads, own_momenta, own_scales, **options, **extra)


def can_unscale(p: Tensor, choice: Choice) -> bool:
    """Whether a kernel updates this parameter from gradients that GradScaler has not unscaled."""
    return any(kernel.unscales and kernel.takes(p, p, p, (), choice) for kernel in KERNELS)


def is_ordinary(tensor: Tensor) -> bool:
    """Whether this is no subclass of Tensor, such as a DTensor or a quantised weight."""
    return type(tensor) in ORDINARY


def _offers(device: torch.device, choice: Choice) -> list[tuple[Kernel, Takes]]:
    """The kernels that may update tensors of a device."""
    offered = [(kernel, kernel.asked(device.type, choice)) for kernel in KERNELS] if choice.kernels else []
    return [(kernel, takes) for kernel, takes in offered if takes is not None]


def _path(
    p: Tensor,
    g: Tensor,
    m: Momentum | None,
    factors: Sequence[Tensor],
    choice: Choice,
    offers: Sequence[tuple[Kernel, Takes]],
) -> Kernel:
    """The kernel, or the way below, that updates this tensor."""
    for kernel, takes in offers:
        if (factors or not kernel.multiplies) and takes(p, g, m, factors):
            return kernel
    if g.shape != p.shape or (m is not None and m.shape != p.shape):
        shapes = f"gradient {tuple(g.shape)} and momentum {'none' if m is None else tuple(m.shape)}"
        raise ValueError(f"A parameter of shape {tuple(p.shape)} came with {shapes}; give all three one shape.")
    if isinstance(m, QuantizedMomentum) or (m is not None and m.dtype != p.dtype):
        return _WIDENED
    if choice.stochastic_rounding and p.dtype == torch.bfloat16:
        return _WIDENED
    return _MULTI_TENSOR if choice.together(p) else _SINGLE_TENSOR


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device, non_blocking=True)


def _rate_on(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """The learning rate as every path takes it: a number, or a tensor without dimensions on the device."""
    if not isinstance(lr, Tensor):
        return lr
    lr = lr.reshape(())
    return lr.item() if lr.is_cpu and device.type != "cpu" else _on(lr, device)  # type: ignore[return-value]


def multiplied(g: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """A gradient times its factors, in place where that can be."""
    if factors and any(stride == 0 and size > 1 for stride, size in zip(g.stride(), g.shape, strict=True)):
        g = g.contiguous()  # an expanded gradient has several elements in one place
    for factor in factors:
        g.mul_(factor)
    return g


def _single_tensor(params, grads, momentum_buffers, scales, *, lr, momentum, ahead, weight_decay, maximize):
    """The plain path, which the others must equal to rounding."""
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        # --- gradient
        direction = (-g if maximize else g).to(p.dtype)
        # --- momentum
        if momentum != 0:
            further = m.lerp(direction, ahead) if ahead != 1 - momentum else m
            m.lerp_(direction, 1 - momentum)
            direction = further
        # --- decoupled weight decay
        if weight_decay != 0:
            p.mul_(1 - lr * weight_decay)
        # --- scaled step
        if isinstance(lr, Tensor):
            p.addcmul_(direction, (lr * scale).to(p), value=-1)
        else:
            p.add_(direction, alpha=-lr * scale)


def _multi_tensor(params, grads, momentum_buffers, scales, *, lr, momentum, ahead, weight_decay, maximize):
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
        looks_ahead = momentum != 0 and ahead != 1 - momentum
        if momentum != 0:
            buffers = [momentum_buffers[i] for i in indices]
            further = list(torch._foreach_lerp(buffers, directions, ahead)) if looks_ahead else buffers
            torch._foreach_lerp_(buffers, directions, 1 - momentum)
            directions = further
        # --- decoupled weight decay
        if weight_decay != 0:
            torch._foreach_mul_(bucket, 1 - lr * weight_decay)
        # --- scaled step
        own = [scales[i] if isinstance(lr, Tensor) else lr * scales[i] for i in indices]
        if looks_ahead:  # these are nobody else's
            torch._foreach_mul_(directions, own)
        else:
            directions = list(torch._foreach_mul(directions, own))
        if isinstance(lr, Tensor):
            torch._foreach_mul_(directions, lr)
        torch._foreach_sub_(bucket, directions)


def _widened(
    params, grads, momentum_buffers, scales, *, lr, momentum, ahead, weight_decay, maximize, stochastic_rounding
):
    """In float32 or better, piece by piece: a momentum of another dtype, stochastic rounding."""
    decay = 1 - lr * weight_decay
    momenta = momentum_buffers if momentum != 0 else [None] * len(params)
    for *tensors, scale in zip(params, grads, momenta, scales, strict=True):
        step = lr * scale
        for p, g, m in _pieces(*tensors):
            wide = torch.promote_types(p.dtype, torch.float32)
            # --- gradient
            direction = (-g if maximize else g).to(wide)
            # --- momentum
            if m is not None:
                old = load(m).to(wide)  # which may be m itself
                new = old.lerp(direction, 1 - momentum)
                direction = old.lerp(direction, ahead) if ahead != 1 - momentum else new
                store(m, new)
            # --- decoupled weight decay and scaled step
            updated = p.to(wide) * decay - step * direction
            p.copy_(stochastically_rounded(updated) if stochastic_rounding and p.dtype == torch.bfloat16 else updated)


def _pieces(p: Tensor, g: Tensor, m: Momentum | None) -> Iterator[tuple[Tensor, Tensor, Momentum | None]]:
    """Pieces that share the tensors' memory: flat if that lies in order, else some rows of the first dimension."""
    plain = [t for t in (p, g, m) if isinstance(t, Tensor)]
    scattered = isinstance(m, QuantizedMomentum) and not m.codes.is_contiguous()
    if p.numel() <= _PIECE or scattered or not all(map(is_ordinary, plain)):
        yield p, g, m
        return
    if all(t.is_contiguous() for t in plain):
        p, g, m = (t.view(-1) if isinstance(t, Tensor) else t for t in (p, g, m))  # type: ignore[assignment]
    width = p.numel() // len(p)
    together = _BLOCK // math.gcd(_BLOCK, width)  # rows that are whole blocks
    rows = max(1, _PIECE // width // together) * together
    for start in range(0, len(p), rows):
        own = slice(start, start + rows)
        if isinstance(m, QuantizedMomentum):
            yield p[own], g[own], m.piece(start * width, p[own].shape)
        else:
            yield p[own], g[own], None if m is None else m[own]


def _all(*_: Any) -> Takes:
    return lambda *_: True


# Every tensor has one of these ways, so nobody asks them.
_SINGLE_TENSOR = Kernel("single_tensor", _all, _single_tensor, looks_ahead=True)
_MULTI_TENSOR = Kernel("multi_tensor", _all, _multi_tensor, looks_ahead=True)
_WIDENED = Kernel("widened", _all, _widened, rounds=True, looks_ahead=True)
