"""One part of the measurement: its options, and its JSON file, which is written anew with every result."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import math
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.gpu.device import Device
from hf_sai.runs.environment import command_line, hardware
from hf_sai.runs.files import atomic_write

__all__ = ["COMPLETE", "CUT_OFF", "ROOT", "Part"]

ROOT = Path(__file__).resolve().parents[2]

#: What a file says of its part until that has come to its end: whoever kills it need not tell it before.
CUT_OFF = "cut off"
COMPLETE = "complete"

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "numba", "bitsandbytes", "sgd-sai")


class Part:
    """A part that runs: a context, whose end writes how it ended.

    Args:
        name: Of the part and its file.
        doc: The part's own docstring, for ``--help``.
        argv: Its options. Default: those of the command.

    Attributes:
        results: What was measured; :meth:`save` after each change.
        not_measured: What failed, and why.
    """

    def __init__(self, name: str, doc: str | None, argv: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of the JSON files")
        parser.add_argument("--seconds", type=float, default=math.inf, help="after which it is ended (default: never)")
        parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
        options = parser.parse_args(argv)
        self.rehearse: bool = options.rehearse
        self.device = Device(self.rehearse)
        self._begun, self._seconds = time.monotonic(), options.seconds
        self._path = options.output / f"{name}.json"
        self.results: dict[str, Any] = {}
        self.not_measured: dict[str, str] = {}
        self._warnings: list[str] = []
        self._content: dict[str, Any] = {
            "part": name,
            "status": CUT_OFF,
            "rehearsal": self.rehearse,
            "environment": _environment(self.device),
            "results": self.results,
            "not_measured": self.not_measured,
            "warnings": self._warnings,
        }

    def __enter__(self) -> Part:
        logging.getLogger("hf_sai").addHandler(_Keep(self._warnings))
        self.save()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._content["status"] = COMPLETE if error is None else f"failed: {_told(error)}"
        self.save()

    def seconds_left(self) -> float:
        """Until this part is ended; infinite where nobody will."""
        return self._seconds - (time.monotonic() - self._begun)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._content["seconds"] = round(time.monotonic() - self._begun, 1)
        atomic_write(self._path, json.dumps(self._content, indent=1, default=_plain) + "\n")

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Measure something whose failure must not stop the rest: the file names it, and why."""
        try:
            yield
        except Exception as error:
            self.not_measured[name] = _told(error)
            print(f"{name}: {self.not_measured[name]}", flush=True)
            if not isinstance(error, ImportError | TimeoutError | torch.OutOfMemoryError):
                traceback.print_exc()
        self.device.free()
        self.save()


class _Keep(logging.Handler):
    """Keeps each warning once: a kernel that is passed over must not look like one that ran."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self._kept:
            self._kept.append(record.getMessage())


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _plain(value: Any) -> Any:
    """JSON for what is neither number nor text."""
    return str(value)


def _environment(device: Device) -> dict[str, Any]:
    """Card, versions, date and command."""
    found = {
        "card": torch.cuda.get_device_name() if device.cuda else "none (rehearsal on a CPU)",
        "date": datetime.date.today().isoformat(),
        "command": command_line(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hardware": hardware(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
