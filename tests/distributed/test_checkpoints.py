"""A resumed run equals the uninterrupted one, on as many ranks or on others, and after SIGKILL."""

import time

import pytest
from launch import finish, kill, run_ranks, start_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(engine, world size) -> folder of the checkpoint and the uninterrupted run's report; each is saved once."""
    known = {}

    def save(engine, world_size):
        if (engine, world_size) not in known:
            folder = tmp_path_factory.mktemp("saved")
            runs = run_ranks("checkpoint_worker.py", world_size, folder / "run", "save", engine, str(folder))
            known[engine, world_size] = folder, runs[0]
        return known[engine, world_size]

    return save


@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [("fsdp2", 2, 2), ("fsdp2", 2, 1), ("fsdp2", 2, 4), ("fsdp2", 4, 2), ("fsdp1", 2, 2)],
)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(saved, tmp_path, engine, before, after):
    folder, uninterrupted = saved(engine, before)
    for result in run_ranks("checkpoint_worker.py", after, tmp_path, "resume", engine, str(folder)):
        assert result.keys() == ({"sharded"} if engine == "fsdp1" else {"sharded", "full"})
        for resumed in result.values():
            assert resumed["after"] == uninterrupted["after"]  # never measured again
            assert resumed["collectives"] == 0
            if before == after:
                assert resumed["losses"] == uninterrupted["losses"]
            assert resumed["losses"] == pytest.approx(uninterrupted["losses"], rel=1e-5)


@pytest.mark.parametrize("when", ["training", "saving"])
def test_nothing_is_lost_but_the_unsaved_step_when_a_rank_is_killed(tmp_path, when):
    place = tmp_path / "checkpoints"
    place.mkdir()
    processes = start_ranks("checkpoint_worker.py", 2, tmp_path / "dies", "die", "fsdp2", str(place))
    deadline = time.monotonic() + 120
    try:
        while not (place / "step_3").exists() or (when == "saving") != any(place.glob("*.partial")):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.0005)
        processes[1].kill()
    finally:
        kill(processes[1:])
        finish(processes, timeout=1)
    assert all(process.poll() is not None for process in processes)
    for result in run_ranks("checkpoint_worker.py", 2, tmp_path / "survives", "survive", "fsdp2", str(place)):
        assert result["step"] >= 3
        assert result["losses"] == result["expected"]
        assert None not in result["gsnr"].values()


def test_accelerates_save_state_and_load_state_resume_bit_for_bit(tmp_path):
    for result in run_ranks("accelerate_worker.py", 2, tmp_path):
        assert result == {
            name: {"type": kind, "processes": 2, "same_loss": True, "same_gsnr": True}
            for name, kind in (("ddp", "MULTI_CPU"), ("fsdp2", "FSDP"))
        }
