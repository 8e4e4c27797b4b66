"""Calls a function when a module is imported, or at once if it is there already; imports nothing by itself."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

logger = logging.getLogger(__name__)

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}
_lock = threading.Lock()


def when_imported(module: str, call: Callable[[ModuleType], None]) -> None:
    """Call a function with a module as soon as somebody has imported it; at once if it is imported.

    What the function raises is logged as a warning: an import of theirs never fails because of us. A module whose
    import fails is waited for again.

    Args:
        module: Its full name.
        call: Called once, with the module, after its code has run.
    """
    with _lock:
        there = sys.modules.get(module)
        if there is None:
            _waiting.setdefault(module, []).append(call)
            if _FINDER not in sys.meta_path:
                sys.meta_path.insert(0, _FINDER)
            return
    if _is_initializing(there):
        # Another thread is importing it, or this one is, and came here on the way: its spec says when that is over.
        _TellingSpec.tell(there, lambda: when_imported(module, call))
    else:
        _call(call, there)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _call(call: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        call(module)
    except Exception as error:
        logger.warning("hf-sai could not prepare %s: %s: %s", module.__name__, type(error).__name__, error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, and lets their loader tell when it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None


class _Loader(importlib.abc.Loader):
    """The loader that was found, and then our calls. Everything else is asked of that loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: inspect and pkgutil look at it.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        with _lock:
            calls = _waiting.pop(module.__name__, [])
        for call in calls:
            _call(call, module)


class _TellingSpec(importlib.machinery.ModuleSpec):
    """The spec of a module whose import is under way, for as long as it is: calls when the import machinery is done."""

    @classmethod
    def tell(cls, module: ModuleType, call: Callable[[], None]) -> None:
        spec = module.__spec__
        assert spec is not None
        with _lock:
            over = not spec._initializing  # type: ignore[attr-defined]
            if not over:
                vars(spec).setdefault("_hf_sai_calls", []).append(call)
                spec.__class__ = cls
                if not _is_initializing(module):  # it ended in between, unnoticed
                    vars(spec)["_hf_sai_calls"].remove(call)
                    over = True
        if over:
            call()

    @property
    def _initializing(self) -> bool:
        return bool(vars(self)["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        vars(self)["_initializing"] = value
        if not value:
            with _lock:
                self.__class__ = importlib.machinery.ModuleSpec  # type: ignore[assignment]
                calls = vars(self).pop("_hf_sai_calls", [])
            for call in calls:
                call()


_FINDER = _Finder()
