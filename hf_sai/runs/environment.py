"""What a run ran on: package versions, hardware, and the command that started it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import socket
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
#: What starts a training script in processes of its own, by the name of the program or of the module.
_LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "accelerate.commands.launch", "torch.distributed.run")
#: deepspeed's launcher starts another one.
_MAX_LAUNCHERS = 3
_ADDRESS = re.compile(r"(--(?:main_process_ip|master[_-]addr|rdzv[_-]endpoint)(?:=|\s+))\S+")


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
    """The command that trains, for a shell, launcher included, with nothing that only this machine knows.

    The interpreter becomes ``python``, a launcher's path its name, paths as in :func:`short_path`, addresses of
    machines ``HOST``. Secrets are not looked for here: what is written goes through ``redact`` as a whole.
    """
    words = _launcher_words() or ["python", *sys.orig_argv[1:]]
    return _ADDRESS.sub(r"\g<1>HOST", " ".join(shlex.quote(short_path(word)) for word in words))


def is_main_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def short_path(word: str) -> str:
    """A word of a command, or a path, without what only this machine knows.

    The working directory is left out, the home directory becomes ``~``, and of other absolute paths the last part is
    kept. The machine's name, with which TensorBoard's folders end, becomes ``HOST``.

    Example:
        >>> short_path("--data=/mnt/somebody/corpus.txt")
        '--data=/path/to/corpus.txt'
    """
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    if os.path.isabs(value):
        path = Path(value)
        if path.is_relative_to(Path.cwd()):
            value = str(path.relative_to(Path.cwd()))
        elif path.is_relative_to(Path.home()) and Path.home() != Path("/"):
            value = f"~/{path.relative_to(Path.home())}"
        else:
            value = f"/path/to/{path.name}"
    value = re.sub(rf"_{re.escape(socket.gethostname())}(?=$|/)", "_HOST", value)
    return f"{option}{equals}{value}"


def _launcher_words() -> list[str] | None:
    """The words of the launcher that started this process with the same script and arguments; None without one."""
    try:
        import psutil  # accelerate needs it
    except ImportError:
        return None
    script = sys.orig_argv[-len(sys.argv) :]
    found = None
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents()[:_MAX_LAUNCHERS]:
            words = process.cmdline()[1:]  # without the interpreter
            module = words[:1] == ["-m"]
            name = words[1] if module and len(words) > 1 else os.path.basename(words[0] if words else "")
            if name in _LAUNCHERS and words[-len(script) :] == script:
                found = ["python", *words] if module else [name, *words[1:]]
    return found


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
