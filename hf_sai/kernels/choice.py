"""Which kernel updates a tensor: the table of all kernels, in the order in which they are asked.

Triton's are used with ``fused=True`` alone: no run on a GPU has shown them right and faster yet.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_sai.kernels import bitsandbytes_8bit, torch_fused
from hf_sai.optim.layout import ORDINARY, Part
from hf_sai.optim.rules import averaged, factored
from hf_sai.optim.rules.averaged import Step
from hf_sai.optim.update import KERNELS, Choice, Kernel, Takes

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
    name: str,
    device_type: str,
    when: Callable[[Choice], bool] | None = None,
    module_name: str | None = None,
    **more: bool,
) -> Kernel:
    """A kernel in a module (of its name), which is imported when a tensor of its device first asks for it."""
    source = module_name or name

    def offers(device: str, choice: Choice) -> Takes | None:
        if device != device_type or choice.traced or (when is not None and not when(choice)):
            return None
        module = _imported(source)
        return None if module is None else module.can_update

    def update(*lists: Any, **options: Any) -> None:
        module = _imported(source)
        assert module is not None
        module.update(*lists, **options)

    return Kernel(name, offers, update, looks_ahead=True, **more)


def _if_asked(choice: Choice) -> bool:
    return bool(choice.fused)


KERNELS[:] = [
    _compiled("numba_factored", "cpu", multiplies=True),
    _compiled("numba_plain", "cpu", unscales=True),
    _compiled("numba_lowbit", "cpu"),
    _compiled("triton_normalised", "cuda", _if_asked, "triton_step", unscales=True, multiplies=True, rounds=True),
    _compiled("triton_step", "cuda", _if_asked, unscales=True, rounds=True),
    Kernel("bitsandbytes_8bit", bitsandbytes_8bit.offers, bitsandbytes_8bit.update),
    Kernel("torch_fused", torch_fused.offers, torch_fused.update, unscales=True),
]


def _wanted(part: Part) -> str | None:
    """The module whose kernels make the factors of a part, if it is one that they could take and options allow them."""
    p, group = part.param, part.group
    if part.grad is None or type(p) not in ORDINARY:
        return None
    if type(part) is not Part and (part.holders() or part.boxes(part.grad) is not None):
        return None
    fused = group["fused"]
    if p.is_cpu:
        return "numba_factored" if fused or fused is group["foreach"] else None
    return "triton_factored" if p.is_cuda and fused else None


def _factors(parts: Sequence[Part]) -> dict[int, Sequence[Tensor]]:
    """Factors of ``update="factored"`` for those parts that a module's kernels take, by their index."""
    by_module: dict[str | None, dict[int, Part]] = defaultdict(dict)
    for index, part in enumerate(parts):
        by_module[_wanted(part)][index] = part
    found: dict[int, Sequence[Tensor]] = {}
    for name, mine in by_module.items():
        module = compiled_module(name) if name else None
        if module is not None:
            found |= module.factors(mine)
    return found


def _average(steps: list[Step]) -> list[Step]:
    """Make the steps of ``update="averaged"`` that numba's kernel takes; returns the others."""
    asked = [_wanted(step.part) == "numba_factored" for step in steps]
    module = compiled_module("numba_factored") if any(asked) else None
    if module is None:
        return steps
    left = module.average(list(itertools.compress(steps, asked)))
    return [*left, *(step for step, ours in zip(steps, asked, strict=True) if not ours)]


factored.FASTER[:] = [_factors]
averaged.FASTER[:] = [_average]
