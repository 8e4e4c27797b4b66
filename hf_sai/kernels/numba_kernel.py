"""One pass over CPU memory a step, compiled by numba: parameter, gradient, momentum read and two of them written, once.

numba brings its own compiler (LLVM), so this needs none on the machine. Every element is computed alike, whatever
thread or part of a vector it falls to: the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from threading import Thread

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["can_update", "coefficients", "in_shares", "jit", "momentum_step", "shares", "update"]

#: Compiles a loop that leaves Python's lock and may contract a product and a sum into one operation.
jit = numba.njit(nogil=True, fastmath={"contract"})

#: With fewer elements in all, starting threads takes longer than they save.
_MIN_ELEMENTS_FOR_THREADS = 1 << 22

#: Threads meet at multiples of this many elements, so that no two write to one cache line.
_ALIGNMENT = 64


def can_update(p: Tensor, g: Tensor, m: Tensor | None) -> bool:
    """Whether the kernel takes these (dense, of one dtype, float32 or float64); not for subclasses of Tensor."""
    tensors = (p, g) if m is None else (p, g, m)
    return p.dtype in (torch.float32, torch.float64) and all(
        t.is_cpu and t.dtype == p.dtype and t.is_contiguous() for t in tensors
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
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts."""
    if found_inf is not None and found_inf.item() > 0:
        return
    lr = float(lr)
    sign = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    work = []
    for p, g, m, scale in zip(params, grads, momentum_buffers, scales, strict=True):
        tensors = [p, g] if m is None or momentum == 0 else [p, g, m]
        arrays = [t.detach().view(-1).numpy() for t in tensors]
        numbers = coefficients(arrays[0].dtype, scale, lr, momentum, weight_decay, sign)
        work.append((arrays, numbers[: len(arrays) + 1]))  # without a momentum it has no weight

    kernel = _plain_step if momentum == 0 else momentum_step

    def run(index: int, start: int, stop: int) -> None:
        arrays, numbers = work[index]
        kernel(*(array[start:stop] for array in arrays), *numbers)

    in_shares([p.numel() for p in params], run)


def coefficients(
    dtype: np.dtype, scale: float, lr: float, momentum: float, weight_decay: float, sign: float
) -> list[np.floating]:
    """What the loops call ``decay``, ``step``, ``sign`` and ``weight``, in the dtype in which they compute."""
    return [dtype.type(number) for number in (1 - lr * weight_decay, lr * scale, sign, 1 - momentum)]


def in_shares(sizes: Sequence[int], run: Callable[[int, int, int], None], alignment: int = _ALIGNMENT) -> None:
    """Call ``run(tensor, start, stop)`` for parts that together are all elements, in torch's number of threads.

    Args:
        sizes: The tensors' numbers of elements.
        run: Does its work without Python's lock, or gains nothing.
        alignment: Parts begin at multiples of it.
    """
    threads = torch.get_num_threads() if sum(sizes) >= _MIN_ELEMENTS_FOR_THREADS else 1
    if threads == 1:
        for index, size in enumerate(sizes):
            run(index, 0, size)
        return

    failures: list[BaseException] = []

    def run_all(share: Iterable[tuple[int, int, int]]) -> None:
        try:
            for part in share:
                run(*part)
        except BaseException as failure:  # in a thread it would only be printed
            failures.append(failure)

    # New threads each step, for a tenth of a millisecond: those that wait for the next step would not survive a fork.
    # This one works, too: a pool beside it takes milliseconds to wake up.
    own, *others = shares(sizes, threads, alignment)
    helpers = [Thread(target=run_all, args=(share,)) for share in others]
    for helper in helpers:
        helper.start()
    run_all(own)
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def shares(sizes: Sequence[int], threads: int, alignment: int = _ALIGNMENT) -> list[list[tuple[int, int, int]]]:
    """Divide tensors of these sizes among threads, to equal numbers of elements but for the alignment.

    Returns:
        For each thread ``(tensor, start, stop)``, which together cover every element once.

    Example:
        >>> shares([100, 60], 2)
        [[(0, 0, 64)], [(0, 64, 100), (1, 0, 60)]]
    """
    total, done = sum(sizes), 0
    result: list[list[tuple[int, int, int]]] = [[] for _ in range(threads)]
    thread = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            left = total * (thread + 1) // threads - done
            stop = size if thread == threads - 1 else min(size, start + left // alignment * alignment)
            if stop > start:
                result[thread].append((index, start, stop))
                done, start = done + stop - start, stop
            if start < size:
                thread += 1
    return result


@jit
def momentum_step(p, g, m, decay, step, sign, weight):
    for i in range(p.size):
        direction = m[i] + weight * (sign * g[i] - m[i])
        m[i] = direction
        p[i] = decay * p[i] - step * direction


@jit
def _plain_step(p, g, decay, step, sign):
    for i in range(p.size):
        p[i] = decay * p[i] - step * (sign * g[i])
