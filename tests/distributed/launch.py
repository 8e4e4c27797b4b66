"""Starts test workers as real processes, waits for them with a limit, and leaves none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_ranks(
    script: str, world_size: int, folder: Path, *arguments: str, timeout: float = 150
) -> list[dict[str, Any]]:
    """Run ``script`` in ``world_size`` processes and return what each wrote to ``folder/result_<rank>.json``.

    The ranks meet through a file, so that no port is fixed. All are killed when one fails or time runs out.

    Args:
        script: File name in this folder.
        world_size: Number of processes.
        folder: Where to meet and to leave results; empty.
        *arguments: For the script.
        timeout: Limit in seconds.
    """
    outcome = finish(start_ranks(script, world_size, folder, *arguments), timeout)
    assert not any(outcome), "\n".join(log(folder, rank)[-6000:] for rank in range(world_size) if outcome[rank])
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world_size)]


def start_ranks(script: str, world_size: int, folder: Path, *arguments: str) -> list[subprocess.Popen]:
    """Start the processes of :func:`run_ranks`, each the leader of its own process group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "HF_SAI_TEST_FOLDER": str(folder),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": "1",
        }
        with (folder / f"log_{rank}.txt").open("w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", str(HERE / script), *arguments],
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float) -> list[int]:
    """Wait for all processes; if one fails or time runs out, kill all with whatever they have started.

    Returns:
        Exit codes.
    """
    import time

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
    """SIGKILL to the process groups of those that still run."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def log(folder: Path, rank: int) -> str:
    """What a rank printed."""
    return f"--- rank {rank}\n" + (folder / f"log_{rank}.txt").read_text()
