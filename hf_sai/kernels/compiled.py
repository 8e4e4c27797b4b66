"""Which updates are compiled by numba or Triton: where they are installed, and where it pays."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["compiled_module", "wants_compiled"]

#: With fewer elements on CPU the automatic choice does without numba, which takes a second to load and compile.
MIN_ELEMENTS_TO_COMPILE = 1 << 24

#: With fewer in the average tensor numba gains nothing: it takes longer to call than torch's kernel.
MIN_AVERAGE_TO_COMPILE = 1 << 17


def compiled_module(name: str) -> ModuleType | None:
    """A module of this package; None if what it is written in is not installed, and while torch.compile traces."""
    return None if torch.compiler.is_compiling() else _imported(name)


def wants_compiled(params: Iterable[Tensor], foreach: bool | None, fused: bool | None) -> bool:
    """Whether these parameters together are to be updated by numba or Triton: if asked, or on CPU if they are large."""
    if foreach is None and fused is None:
        sizes = [p.numel() for p in params if p.is_cpu]
        return sum(sizes) >= max(MIN_ELEMENTS_TO_COMPILE, MIN_AVERAGE_TO_COMPILE * len(sizes))
    return bool(fused)


@functools.cache
def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:  # or not for this numpy or Python
        return None
