"""Settings all tests share, and which of them are quick: those that start no process and train no recipe."""

import multiprocessing.process
import os
import sys
from pathlib import Path

import pytest

# Two test processes on two cores are slower with two threads each; and no test may wait for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
#: Folders and files of which every test is marked ``processes``; elsewhere single tests bear the marker.
WITH_PROCESSES = (
    "distributed",
    "docs/test_scaling.py",
    "recipes/diffusers/test_diffusers_comparison.py",
    "recipes/diffusers/test_diffusers_training.py",
    "recipes/test_gpt2_recipe.py",
    "recipes/test_llama_lora_recipe.py",
    "recipes/test_vit_recipe.py",
)
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")
_started: list[str] = []


def pytest_collection_modifyitems(items):
    for item in items:
        place = item.path.relative_to(HERE)
        if any(place.is_relative_to(name) for name in WITH_PROCESSES):
            item.add_marker(pytest.mark.processes)


def _watch(event, arguments):
    if event in _STARTS:
        _started.append(f"{event} {arguments[:1]}")


def _watched_start(self, start=multiprocessing.process.BaseProcess.start):
    _started.append(f"multiprocessing {self.name}")
    start(self)


sys.addaudithook(_watch)
multiprocessing.process.BaseProcess.start = _watched_start  # spawning raises no audit event


@pytest.fixture(autouse=True)
def _quick_tests_start_no_process(request):
    """A test without one of the markers fails if it started a process, so that the quick tests stay quick."""
    _started.clear()
    yield
    if not any(request.node.get_closest_marker(name) for name in ("processes", "slow", "gpu")):
        assert not _started, f"mark this test @pytest.mark.processes, since it started {_started[0]}"
