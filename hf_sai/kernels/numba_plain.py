"""One pass over CPU memory a step by numba: parameter, gradient and momentum read, two of them written, once.

numba brings its own compiler (LLVM), so this needs none on the machine. Every element is computed alike, whatever
thread or part of a vector it falls to: the number of threads changes no bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sai.kernels import numba_loops
from hf_sai.optim.layout import ORDINARY
from hf_sai.optim.momentum import Momentum

__all__ = ["addresses", "can_update", "coefficients", "in_shares", "is_dense", "of_one_dtype", "shares", "update"]

#: numpy's dtype for each of torch's that the kernels take.
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

#: With fewer elements in all, starting threads takes longer than they save.
_MIN_ELEMENTS_FOR_THREADS = 1 << 22

#: Threads meet at multiples of this many elements, so that no two write to one cache line.
_ALIGNMENT = 64


def is_dense(tensor: Tensor, p: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a kernel may go through this tensor's memory from its address as it goes through the parameter's."""
    return (
        tensor.is_cpu and tensor.dtype == (dtype or p.dtype) and tensor.numel() == p.numel() and tensor.is_contiguous()
    )


def can_update(p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor] = ()) -> bool:
    """Whether the kernel takes these: dense, of one dtype and size, float32 or float64; not for Tensor's subclasses."""
    # Asked for every tensor in every step: no function calls that can be done without.
    dtype, size = p.dtype, p.numel()
    if not (dtype in DTYPES and type(p) in ORDINARY and p.is_cpu and p.is_contiguous()):
        return False
    if not (g.dtype == dtype and g.numel() == size and g.is_cpu and g.is_contiguous()):
        return False
    if m is None:
        return True
    return isinstance(m, Tensor) and m.dtype == dtype and m.numel() == size and m.is_cpu and m.is_contiguous()


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    momentum: float,
    ahead: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of :func:`hf_sai.sgd_sai`, whose arguments these are; tensors that :func:`can_update` accepts."""
    if found_inf is not None and found_inf.item() > 0:
        return
    sign = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    tensors = [params, grads] if momentum == 0 else [params, grads, momentum_buffers]
    for dtype, (own_scales, *own) in of_one_dtype(params, scales, *tensors):
        table = addresses(*own)
        numbers = coefficients(dtype, own_scales, lr, momentum, ahead, weight_decay, sign)
        in_shares([p.numel() for p in own[0]], lambda share: numba_loops.step_plain(table, numbers, share))  # noqa: B023


def of_one_dtype(params: Sequence[Tensor], *lists: Sequence[Any]) -> Iterator[tuple[Any, Sequence[Sequence[Any]]]]:
    """For each of numpy's dtypes that parameters have, the lists of what belongs to these parameters."""
    dtypes = [p.dtype for p in params]
    for dtype in dict.fromkeys(dtypes):
        mine = [each == dtype for each in dtypes]
        yield DTYPES[dtype], lists if all(mine) else [list(itertools.compress(each, mine)) for each in lists]


def addresses(*lists: Sequence[Tensor]) -> np.ndarray:
    """The table of addresses that the loops take, int64[tensors, lists]."""
    table = np.empty((len(lists[0]), len(lists)), dtype=np.int64)
    for index, of_kind in enumerate(lists):
        table[:, index] = [t.data_ptr() for t in of_kind]
    return table


def coefficients(
    dtype: Any,
    scales: Sequence[float],
    lr: float | Tensor,
    momentum: float,
    ahead: float,
    weight_decay: float,
    sign: float,
) -> np.ndarray:
    """What the loops call decay, step, sign, weight and ahead, [tensors, 5] in the dtype in which they compute."""
    lr = float(lr)
    numbers = np.empty((len(scales), 5), dtype=dtype)
    numbers[:] = (1 - lr * weight_decay, 0.0, sign, 1 - momentum, ahead)
    numbers[:, 1] = lr * np.array(scales)
    return numbers


def in_shares(sizes: Sequence[int], run: Callable[[np.ndarray], None], alignment: int = _ALIGNMENT) -> None:
    """Call ``run(share)`` in torch's number of threads, with shares that together are all elements.

    Args:
        sizes: The tensors' numbers of elements.
        run: Does its work without Python's lock, or gains nothing. A share is int64[parts, 3]: tensor, start, stop.
        alignment: Parts begin at multiples of it.
    """
    threads = torch.get_num_threads() if sum(sizes) >= _MIN_ELEMENTS_FOR_THREADS else 1
    if threads == 1:
        share = np.zeros((len(sizes), 3), dtype=np.int64)
        share[:, 0], share[:, 2] = np.arange(len(sizes)), sizes
        run(share)
        return
    parts = [np.array(share, dtype=np.int64) for share in shares(sizes, threads, alignment) if share]
    if len(parts) < 2:
        for share in parts:
            run(share)
        return
    own, *others = parts
    failures: list[BaseException] = []

    def run_one(share: np.ndarray) -> None:
        try:
            run(share)
        except BaseException as failure:  # in a thread it would only be printed
            failures.append(failure)

    # New threads each step, for a tenth of a millisecond: those that wait for the next step would not survive a fork.
    # This one works, too: a pool beside it takes milliseconds to wake up.
    helpers = [Thread(target=run_one, args=(share,)) for share in others]
    for helper in helpers:
        helper.start()
    run_one(own)
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
