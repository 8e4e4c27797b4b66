"""A rank that is killed with SIGKILL, in training or in saving, loses nothing but what was not saved."""

import importlib.util
import random
import time

import pytest
from launch import LIMIT, finish, kill, log, run_ranks, start_ranks

ENGINES = ["fsdp1", "fsdp2", "zero2", "zero3"]
#: Runs that die, of each engine.
MOMENTS = 5


def killed(engine, place, folder, when, victim=1):
    """A run of which one rank was killed; its processes have ended.

    Args:
        engine: What it trains under.
        place: For its checkpoints.
        folder: For its processes.
        when: ``training`` or ``saving``; or so many seconds after the first three checkpoints.
        victim: The rank.
    """
    place.mkdir()
    processes = start_ranks("killed_worker.py", 2, folder, "die", engine, str(place))
    deadline = time.monotonic() + LIMIT

    def wait(done):
        while not done():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes), log(folder, 0) + log(folder, 1)
            time.sleep(0.0005)

    try:
        wait((place / "step_3").exists)
        if isinstance(when, float):
            time.sleep(when)
        else:
            wait(lambda: (when == "saving") == any(place.glob("*.partial")))
        processes[victim].kill()
    finally:
        kill([process for process in processes if process is not processes[victim]])
        finish(processes, timeout=1)
    assert all(process.poll() is not None for process in processes)


def check_survivors(engine, places, folder):
    words = [word for place in places for word in ("survive", engine, str(place))]
    for report in run_ranks("killed_worker.py", 2, folder, *words):
        assert report["world_size"] == 2
        for place in places:
            result = report[f"survive {engine} {place}"]
            assert result["step"] >= 3
            assert result["losses"] == result["expected"]
            assert result["gsnr"] == result["expected_gsnr"]
            assert None not in result["gsnr"].values()


def need(engine):
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")


@pytest.mark.parametrize("engine", ["fsdp2"])
def test_nothing_is_lost_but_the_unsaved_step_when_a_rank_is_killed_in_training_or_in_saving(engine, tmp_path):
    places = [tmp_path / when for when in ("training", "saving")]
    for place in places:
        killed(engine, place, tmp_path / f"{place.name}_dies", place.name)
    check_survivors(engine, places, tmp_path / "survives")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_may_be_killed_at_any_moment(engine, tmp_path):
    need(engine)
    moments = random.Random(f"{engine} 16")
    places = [tmp_path / str(number) for number in range(MOMENTS)]
    for number, place in enumerate(places):
        # One is killed in training and one in saving for certain, the others whenever it is.
        when = ("training", "saving")[number] if number < 2 else moments.uniform(0, 1)
        killed(engine, place, tmp_path / f"{number}_dies", when, victim=moments.randrange(2))
    check_survivors(engine, places, tmp_path / "survives")
