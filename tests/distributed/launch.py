"""Starts test workers as real processes, waits for them with a limit, and leaves none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

HERE = Path(__file__).parent
#: In the environment of all that a test module starts, and of all that those start.
MARK = "HF_SAI_TEST_MARK"
#: ``HF_SAI_TEST_DEVICE=cuda`` runs the same workers with one GPU per rank and NCCL.
DEVICE = os.environ.get("HF_SAI_TEST_DEVICE", "cpu")
ON_DEVICE = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"} if DEVICE == "cpu" else {}
#: Seconds for a launch, far more than it takes on an idle machine.
LIMIT = 900


def run_ranks(
    script: str | Path, world_size: int, folder: Path, *arguments: str, timeout: float = LIMIT
) -> list[dict[str, Any]]:
    """Run ``script`` in ``world_size`` processes and return what each wrote to ``folder/result_<rank>.json``.

    The ranks meet through a file, so that no port is fixed. All are killed when one fails or time runs out.

    Args:
        script: File name in this folder, or a whole path.
        world_size: Number of processes.
        folder: Where to meet and to leave results; empty.
        *arguments: For the script.
        timeout: Limit in seconds.
    """
    outcome = finish(start_ranks(script, world_size, folder, *arguments), timeout)
    assert not any(outcome), "\n".join(log(folder, rank)[-6000:] for rank in range(world_size) if outcome[rank])
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world_size)]


def start_ranks(script: str | Path, world_size: int, folder: Path, *arguments: str) -> list[subprocess.Popen]:
    """Start the processes of :func:`run_ranks`, each the leader of its own process group."""
    if DEVICE == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "HF_SAI_TEST_FOLDER": str(folder),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
            **ON_DEVICE,
            # One process that sees several GPUs would be given nn.DataParallel by Trainer.
            **({"CUDA_VISIBLE_DEVICES": "0"} if DEVICE == "cuda" and world_size == 1 else {}),
        }
        words = ["-u", HERE / script, *arguments]
        processes.append(start_python(words, folder / f"log_{rank}.txt", **environment))
    return processes


def start_python(
    words: Sequence[str | Path | int], log_file: Path, folder: Path | None = None, **environment: str
) -> subprocess.Popen:
    """Start Python, the leader of its own process group.

    Args:
        words: Its command line.
        log_file: For all that it prints.
        folder: Where it works; default: here.
        **environment: What differs from this process's.
    """
    with log_file.open("w") as out:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(processes: list[subprocess.Popen], timeout: float = LIMIT) -> list[int]:
    """Wait for all processes; if one fails or time runs out, kill all with whatever they have started.

    Returns:
        Exit codes.
    """
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() not in (None, 0) for process in processes):
                time.sleep(2)  # let the others say what they saw
                break
            time.sleep(0.05)
    finally:
        kill(processes)
    return [process.wait() for process in processes]


def kill(processes: list[subprocess.Popen]) -> None:
    """End those that still run: SIGTERM, for launchers end their workers then; after a while SIGKILL."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens on, for launchers that cannot be told to choose one: two that are to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def living(mark: str, patience: float = 60) -> list[psutil.Process]:
    """The processes with this mark that still live after ``patience`` seconds; some end a moment after their parent."""
    deadline = time.monotonic() + patience
    while (found := [p for p in psutil.process_iter() if _bears(p, mark)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def end_all(processes: list[psutil.Process]) -> list[str]:
    """SIGKILL; returns what the processes were called."""
    commands = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            commands.append(" ".join(process.cmdline()))
            process.kill()
    return commands


def _bears(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # has ended, or is another user's
        return False


def log(folder: Path, rank: int) -> str:
    """What a rank printed."""
    return f"--- rank {rank}\n" + (folder / f"log_{rank}.txt").read_text()
