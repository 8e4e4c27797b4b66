"""What a run ran on: package versions, hardware, and the command that started it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_sai.runs.paths import short_path
from hf_sai.runs.redact import REDACTED, is_secret_name, redact_words

__all__ = ["command_line", "hardware", "is_main_process", "settings_of", "versions"]

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
#: What runs the cells of notebooks.
_KERNELS = ("ipykernel_launcher", "ipykernel", "colab_kernel_launcher")
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

    The interpreter becomes ``python``, the path of a launcher or an installed command its name, other paths as in
    :func:`short_path`, addresses of machines ``HOST``, and the values of ``--hub_token`` and the like ``<redacted>``.
    A notebook has no such command, since its kernel's is none that anybody could repeat: its file's name stands there,
    where the front end tells it.
    """
    words = _launcher_words() or _own_words()
    if any(module in words for module in _KERNELS):
        return f"# in the notebook {name}" if (name := _notebook()) else "# in a notebook"
    shown = (_quoted(short_path(word)) for word in redact_words(words))
    return _ADDRESS.sub(r"\g<1>HOST", " ".join(shown))


def settings_of(args: Any) -> dict[str, Any]:
    """The training arguments, with a tokenizer's tokens as they are.

    ``to_dict`` of transformers' arguments puts ``<EOS_TOKEN>`` in the place of every field whose name ends so.

    Args:
        args: ``TrainingArguments``.
    """
    settings: dict[str, Any] = args.to_dict()
    for name, value in settings.items():
        given = getattr(args, name, None)
        is_telling = isinstance(given, str) and is_secret_name(name, given)
        if value == f"<{name.upper()}>" and not is_telling:
            settings[name] = given
    return settings


def is_main_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def _quoted(word: str) -> str:
    name, equals, value = word.rpartition("=")
    return f"{shlex.quote(name) if name else ''}{equals}{value}" if value == REDACTED else shlex.quote(word)


def _own_words() -> list[str]:
    """The words that started this process; of an installed command such as ``hf-sai`` as a person types them."""
    words = sys.orig_argv[1:]
    folder, name = os.path.split(words[0] if words else "")
    is_command = folder == os.path.dirname(sys.executable) and not name.endswith(".py")
    return [name, *words[1:]] if is_command else ["python", *words]


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


def _notebook() -> str:
    """The name of the notebook that runs here as Jupyter or VS Code tells it, or nothing."""
    told = (os.environ.get("JPY_SESSION_NAME", ""), str(getattr(sys.modules["__main__"], "__vsc_ipynb_file__", "")))
    return next((Path(name).name for name in told if name.endswith(".ipynb")), "")


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
