"""Notes the objects that an engine makes of one of its classes, so that nobody has to search the heap for them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hf_sai.imports import when_imported

__all__ = ["instances_of"]


def instances_of(module: str, name: str, then: Callable[[Any], None] | None = None) -> weakref.WeakSet[Any]:
    """The living instances of a class that were made since this call, or since its module was imported later.

    Args:
        module: The class's module, which need not be imported or even installed.
        name: The class; instances of subclasses count.
        then: Is called with each when it has been made.
    """
    found: weakref.WeakSet[Any] = weakref.WeakSet()

    def note(imported: ModuleType) -> None:
        cls = getattr(imported, name)
        make = cls.__init__

        @functools.wraps(make)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            found.add(self)
            if then is not None:
                then(self)

        cls.__init__ = init

    when_imported(module, note)
    return found
