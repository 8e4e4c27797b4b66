"""Measures what an optimizer does in a step: bytes of state, seconds, and how far each role's weights move."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Stopwatch", "UpdateMeter", "group_names", "state_bytes", "unwrap_optimizer"]

#: So many elements of each tensor are compared before and after a step; larger tensors are sampled evenly.
SAMPLE = 4096


def unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's (and other) wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


def group_names(optimizer: Any) -> list[str]:
    """The names of an optimizer's groups, one each; ``group 0``, ``group 1``, ... where they have none."""
    return [str(group.get("name", f"group {index}")) for index, group in enumerate(optimizer.param_groups)]


def state_bytes(optimizer: Any) -> int:
    """Bytes of this process's optimizer state, counted over the tensors that are there.

    A storage that several tensors share counts once; tensor subclasses (quantised states, DTensor) count what they
    hold here; a Python number counts 8.

    Args:
        optimizer: A torch optimizer, or a wrapper around one.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(10))
        >>> weight.grad = torch.ones(10)
        >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        40
    """
    storages: dict[Any, int] = {}
    numbers = 0
    for state in unwrap_optimizer(optimizer).state.values():
        for value in state.values() if isinstance(state, dict) else ():
            numbers += isinstance(value, int | float)
            for tensor in _plain_tensors(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values()) + 8 * numbers


class Stopwatch:
    """Adds up the seconds between ``start`` and ``stop``; on CUDA by events, so that nothing has to wait.

    Args:
        device: Where the timed work runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._begun: Any = None
        self._pending: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def start(self) -> None:
        """Begin; a start that was not stopped is forgotten."""
        self._begun = self._now()

    def stop(self) -> None:
        """End; does nothing without a start."""
        if self._begun is None:
            return
        if self._cuda:
            self._pending.append((self._begun, self._now()))
        else:
            self._seconds += self._now() - self._begun
        self._begun = None

    def seconds(self) -> float:
        """The sum so far. On CUDA, of the intervals that the device has finished."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.pop(0)
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class UpdateMeter:
    r"""The update-to-weight ratio of each parameter group, :math:`\|\Delta\theta\| / \|\theta\|`, in one step.

    Works for any optimizer, since it compares parameters before and after. Of a tensor with more than 4,096 elements
    an even sample is compared, which costs next to nothing and is within a few percent; smaller ones are compared
    whole. Sharded parameters are measured on the main process's shard.

    Args:
        optimizer: The optimizer whose ``param_groups`` to watch.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self._before: list[list[Tensor]] = []
        self._sums: Tensor | None = None

    @torch.no_grad()
    def before(self) -> None:
        """Call right before the optimizer's step."""
        self._before = [
            [self._sample(params) for params in _by_device(group["params"])] for group in self._optimizer.param_groups
        ]

    @torch.no_grad()
    def after(self) -> None:
        """Call right after the step; does nothing without ``before``. The result stays on the device for now."""
        groups, before, self._before = self._optimizer.param_groups, self._before, []
        if not before or len(before) != len(groups):  # groups were added in between
            return
        sums: list[Tensor] = []
        for samples, group in zip(before, groups, strict=True):
            both = torch.zeros(2)
            for old, params in zip(samples, _by_device(group["params"]), strict=True):
                weights = self._element_weights(params, old.device)
                moved = (self._sample(params) - old).square_().mul_(weights).sum()
                both = both.to(old.device) + torch.stack([moved, old.square().mul_(weights).sum()])
            sums.append(both)
        self._sums = torch.stack([both.to(sums[0].device) for both in sums])

    def ratios(self) -> dict[str, float] | None:
        """Group name to ratio in the last measured step, once; None if none was measured since the last call.

        A group whose weights are all zero (LoRA's B at the start) has no ratio and is left out.
        """
        if self._sums is None:
            return None
        values, self._sums = (self._sums[:, 0] / self._sums[:, 1]).sqrt().tolist(), None
        pairs = zip(group_names(self._optimizer), values, strict=True)
        return {name: value for name, value in pairs if math.isfinite(value)}

    def whole_ratio(self) -> float | None:
        """As ``ratios``, of all groups together; None also where all weights are zero."""
        if self._sums is None:
            return None
        (moved, there), self._sums = self._sums.sum(0).tolist(), None
        ratio = math.sqrt(moved / there) if there > 0 else math.inf
        return ratio if math.isfinite(ratio) else None

    def _sample(self, params: Iterable[Tensor]) -> Tensor:
        views = [_local(p)[:: _stride(p)] for p in params if _local(p).numel()]
        return torch.cat(views).float() if views else torch.zeros(0)

    def _element_weights(self, params: Iterable[Tensor], device: torch.device) -> Tensor:
        """How many elements each sampled one stands for."""
        sizes = tuple(_local(p).numel() for p in params)
        if sizes not in self._weights:
            parts = [torch.full((math.ceil(n / _stride_of(n)),), float(_stride_of(n))) for n in sizes if n]
            self._weights[sizes] = torch.cat(parts).to(device) if parts else torch.zeros(0)
        return self._weights[sizes]


def _by_device(params: Iterable[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for p in params:
        found.setdefault(p.device, []).append(p)
    return list(found.values())


def _stride_of(elements: int) -> int:
    # Odd, so that rows of even length do not send all samples to few columns.
    return elements // SAMPLE | 1 if elements > SAMPLE else 1


def _stride(p: Tensor) -> int:
    return _stride_of(_local(p).numel())


def _local(p: Tensor) -> Tensor:
    """The parameter's elements in this process, flat."""
    p = p.detach()
    return (p.to_local() if hasattr(p, "to_local") else p).reshape(-1)


def _plain_tensors(value: Any) -> Iterable[Tensor]:
    """The ordinary tensors that hold a value's elements in this process."""
    if not isinstance(value, Tensor):
        return
    if hasattr(value, "to_local"):
        yield from _plain_tensors(value.to_local())
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    else:
        yield value
