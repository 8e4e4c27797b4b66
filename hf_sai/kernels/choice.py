"""Which kernel updates a tensor: the table of all kernels, in the order in which they are asked.

Triton's are used with ``fused=True`` alone: no run on a GPU has shown them right and faster yet.
"""

from __future__ import annotations

import functools
import importlib
import logging
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_sai.kernels import bitsandbytes_8bit, torch_fused
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import Momentum, QuantizedMomentum
from hf_sai.optim.rules.factored import FASTER
from hf_sai.optim.update import KERNELS, Choice, Kernel, is_ordinary

__all__ = ["compiled_module"]

logger = logging.getLogger(__name__)


def compiled_module(name: str) -> ModuleType | None:
    """A module of this folder; None if what it is written in is not installed, and while torch.compile traces."""
    return None if torch.compiler.is_compiling() else _imported(name)


@functools.cache
def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"hf_sai.kernels.{name}")
    except ImportError:  # or not for this numpy or Python
        return None
    except Exception as error:  # a broken compiler must not end a training that can do without it
        logger.warning(
            "%s does not work here (%s: %s); torch's own operations are used.", name, type(error).__name__, error
        )
        return None


def _compiled(
    name: str, device_type: str, when: Callable[[Tensor, Any, Sequence[Tensor], Choice], bool], **more: bool
) -> Kernel:
    """A kernel in a module of its own, which is imported when a tensor of its device first asks for it."""
    of_device = operator.attrgetter(f"is_{device_type}")

    def takes(p: Tensor, g: Tensor, m: Momentum | None, factors: Sequence[Tensor], choice: Choice) -> bool:
        if choice.traced or not of_device(p) or not when(p, m, factors, choice) or not is_ordinary(p):
            return False
        module = _imported(name)
        if module is None:
            return False
        return module.can_update(p, g, m, factors) if device_type == "cuda" else module.can_update(p, g, m)

    def update(*lists: Any, **options: Any) -> None:
        module = _imported(name)
        assert module is not None
        module.update(*lists, **options)

    return Kernel(name, takes, update, **more)


def _is_low_bit(p: Tensor, m: Momentum | None, factors: Sequence[Tensor], choice: Choice) -> bool:
    return isinstance(m, QuantizedMomentum) or (m is not None and m.dtype != p.dtype)


def _is_normalised(p: Tensor, m: Momentum | None, factors: Sequence[Tensor], choice: Choice) -> bool:
    return bool(factors)


def _is_plain(p: Tensor, m: Momentum | None, factors: Sequence[Tensor], choice: Choice) -> bool:
    return True


def _if_asked(p: Tensor, m: Momentum | None, factors: Sequence[Tensor], choice: Choice) -> bool:
    return bool(
        choice.fused
    )  # Triton's kernels have not run on a GPU: nobody knows that they are right and faster there


KERNELS[:] = [
    _compiled("numba_factored", "cpu", _is_normalised, multiplies=True),
    _compiled("numba_lowbit", "cpu", _is_low_bit),
    _compiled("numba_plain", "cpu", _is_plain, unscales=True),
    _compiled("triton_step", "cuda", _if_asked, unscales=True, multiplies=True, rounds=True),
    Kernel("bitsandbytes_8bit", bitsandbytes_8bit.takes, bitsandbytes_8bit.update),
    Kernel("torch_fused", torch_fused.takes, torch_fused.update, unscales=True),
]


def _factors_by(name: str, parts: Sequence[Part], wants: Callable[[Part], bool]) -> dict[int, Sequence[Tensor]]:
    """Factors of ``update="factored"`` for those of the wanted parts that a module's kernels take, by their index."""
    mine = {
        index: part
        for index, part in enumerate(parts)
        if wants(part) and is_ordinary(part.param) and not part.holders()
    }
    module = compiled_module(name) if mine else None
    return {} if module is None else module.factors(mine)


def _factors_by_numba(parts: Sequence[Part]) -> dict[int, Sequence[Tensor]]:
    wanted = {id(group): group["fused"] or group["fused"] is group["foreach"] for group in (p.group for p in parts)}
    return _factors_by("numba_factored", parts, lambda part: wanted[id(part.group)] and part.param.is_cpu)


def _factors_by_triton(parts: Sequence[Part]) -> dict[int, Sequence[Tensor]]:
    return _factors_by("triton_factored", parts, lambda part: part.group["fused"] and part.param.is_cuda)


FASTER[:] = [_factors_by_numba, _factors_by_triton]
