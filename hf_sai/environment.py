"""What a run ran on: package versions, hardware, and the command that started it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["command_line", "hardware", "is_main_process", "short_path", "versions"]

_PACKAGES = (
    "hf-sai",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "diffusers",
    "datasets",
    "evaluate",
    "tokenizers",
    "bitsandbytes",
    "deepspeed",
)


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of the libraries in use in this process.

    Example:
        >>> versions()["torch"] == __import__("torch").__version__
        True
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        if package.replace("-", "_") not in sys.modules:
            continue
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build, "2.13.0+cpu", which the distribution's metadata may lack
    return found


def hardware() -> dict[str, Any]:
    """System, processor, memory (bytes), accelerators with their memory (bytes), threads and number of processes."""
    accelerators = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            accelerators.append({"name": device.name, "memory_bytes": device.total_memory})
    elif torch.backends.mps.is_available():
        accelerators.append({"name": "Apple MPS", "memory_bytes": None})
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "accelerators": accelerators,
        "processes": _world_size(),
    }


def command_line() -> str:
    """The command that started this process, for a shell, with no path of this machine where it can be avoided.

    The interpreter becomes ``python``, paths below the working directory become relative, the home directory ``~``.
    Secrets are not looked for here: what is written goes through ``redact`` as a whole.
    """
    words = ["python", *sys.orig_argv[1:]]
    return " ".join(shlex.quote(short_path(word)) for word in words)


def is_main_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def short_path(word: str) -> str:
    """A word of a command, or a path, with the working directory left out and the home directory as ``~``."""
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    if os.path.isabs(value):
        path = Path(value)
        if path.is_relative_to(Path.cwd()):
            value = str(path.relative_to(Path.cwd()))
        elif path.is_relative_to(Path.home()) and Path.home() != Path("/"):
            value = f"~/{path.relative_to(Path.home())}"
    return f"{option}{equals}{value}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
