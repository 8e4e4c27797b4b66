"""One kernel launch for all tensors of a step on a GPU, in Triton: p, g and m are read and p and m written, once.

The tensors' addresses go to the device in a table, and each program instance looks up which block of which tensor is
its own. Nothing comes back to the host. Learning rate, gradient scale and found_inf may be tensors on the device.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["block_table", "can_update", "update"]

#: Elements of one program instance.
BLOCK = 2048

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def can_update(p: Tensor, g: Tensor, m: Tensor | None) -> bool:
    """Whether the kernel takes these: dense, of 16- or 32-bit float dtypes, which may differ; no Tensor subclasses."""
    tensors = (p, g) if m is None else (p, g, m)
    return all(
        isinstance(t, Tensor)
        and t.dtype in _DTYPES
        and t.is_contiguous()
        and t.device == p.device
        and t.numel() == p.numel()
        for t in tensors
    )


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts.

    Computes in float32 and rounds once to each tensor's dtype.
    """
    if isinstance(lr, Tensor) and lr.device != params[0].device:
        lr = lr.item()
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for i, (p, g, m) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        if p.numel() > 0:
            buckets[p.device, p.dtype, g.dtype, None if m is None or momentum == 0 else m.dtype].append(i)
    for (device, *dtypes), indices in buckets.items():
        kinds: list[Sequence[Any]] = [params, grads] if momentum == 0 else [params, grads, momentum_buffers]
        addresses = [of_kind[i].data_ptr() for of_kind in kinds for i in indices]
        sizes, first_blocks, tensor_of_block = _table_on(device, tuple(params[i].numel() for i in indices))
        arguments: dict[str, Any] = {
            "addresses": _to_device(torch.tensor(addresses, dtype=torch.int64), device),
            "scales": _to_device(torch.tensor([scales[i] for i in indices], dtype=torch.float32), device),
            "sizes": sizes,
            "first_blocks": first_blocks,
            "tensor_of_block": tensor_of_block,
            "tensors": len(indices),
            "lr": lr,
            "decay": 1 - lr * weight_decay,
            "weight": 1 - momentum,
            "sign": -1.0 if maximize else 1.0,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
        }
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _step[(len(tensor_of_block),)](
                **arguments,
                P=_DTYPES[dtypes[0]],
                G=_DTYPES[dtypes[1]],
                M=None if dtypes[2] is None else _DTYPES[dtypes[2]],
                LR_ON_DEVICE=isinstance(lr, Tensor),
                ALIGNED=all(address % 16 == 0 for address in addresses),
                BLOCK=BLOCK,
            )


def block_table(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tensor each block belongs to, and each tensor's first block: int32[blocks], int64[tensors].

    Args:
        sizes: Elements of each tensor, 1 or more; the sum may pass 2^31.
    """
    blocks = torch.tensor([-(-size // BLOCK) for size in sizes], dtype=torch.int64)
    tensor_of_block = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    return tensor_of_block, blocks.cumsum(0) - blocks


@functools.lru_cache(maxsize=64)
def _table_on(device: torch.device, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes and :func:`block_table` on the device; the same in every step, so kept."""
    tensor_of_block, first_blocks = block_table(sizes)
    return torch.tensor(sizes, dtype=torch.int64, device=device), first_blocks.to(device), tensor_of_block.to(device)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    addresses,  # int64[2 or 3, tensors]: of parameters, gradients, momentum buffers
    scales,  # float32[tensors]
    sizes,  # int64[tensors]
    first_blocks,  # int64[tensors]
    tensor_of_block,  # int32[blocks]
    tensors,
    lr,  # a number or a tensor, and so is decay
    decay,
    weight,
    sign,
    grad_scale,  # tensors or None
    found_inf,
    P: tl.constexpr,  # noqa: N803
    G: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    LR_ON_DEVICE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    if found_inf is not None:  # noqa: SIM102 - Triton's `and` would evaluate both
        if tl.load(found_inf) > 0:
            return
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
        decay = tl.load(decay).to(tl.float32)
    if grad_scale is not None:
        sign = sign / tl.load(grad_scale)
    block = tl.program_id(0)
    tensor = tl.load(tensor_of_block + block)
    start = (block - tl.load(first_blocks + tensor)) * BLOCK  # int64, as first_blocks is
    left = tl.load(sizes + tensor) - start
    step = lr * tl.load(scales + tensor)
    p = tl.load(addresses + tensor).to(tl.pointer_type(P))
    g = tl.load(addresses + tensors + tensor).to(tl.pointer_type(G))
    m = p  # not used
    if M is not None:
        m = tl.load(addresses + 2 * tensors + tensor).to(tl.pointer_type(M))
    if ALIGNED:
        p, g, m = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16)
    p, g, m = p + start, g + start, m + start
    if left >= BLOCK:  # without a mask, several elements go in one memory access
        _update_block(p, g, m, left, step, decay, weight, sign, P, M, False, BLOCK)
    else:
        _update_block(p, g, m, left, step, decay, weight, sign, P, M, True, BLOCK)


@triton.jit
def _update_block(  # type: ignore[no-untyped-def]
    p_start,
    g_start,
    m_start,
    left,
    step,
    decay,
    weight,
    sign,
    P: tl.constexpr,  # noqa: N803
    M: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < left if MASKED else None
    # --- gradient
    direction = sign * tl.load(g_start + offsets, mask=inside).to(tl.float32)
    # --- momentum
    if M is not None:
        m = tl.load(m_start + offsets, mask=inside).to(tl.float32)
        direction = m + weight * (direction - m)
        tl.store(m_start + offsets, direction.to(M), mask=inside)
    # --- decoupled weight decay and scaled step
    p = tl.load(p_start + offsets, mask=inside).to(tl.float32)
    p = decay * p - step * direction
    tl.store(p_start + offsets, p.to(P), mask=inside)
