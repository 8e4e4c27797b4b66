"""``--optim sgd_sai`` in Trainer, with PEFT and without: the run and its resume do not depend on the engine."""

import importlib.util
import time
from pathlib import Path

import pytest
from launch import kill, log, run_ranks, start_ranks

TORCH = [
    ("ddp", "full"),
    ("ddp", "lora"),
    ("fsdp2", "full"),
    ("fsdp2", "lora"),
    ("fsdp1", "full"),
    ("fsdp1", "factored"),
]
WHAT = ("full", "lora", "factored")
ZERO = [("zero1", "lora"), ("zero2", "full"), ("zero2", "lora"), ("zero3", "full"), ("zero3", "lora")]
#: A resume on other numbers of ranks; DeepSpeed has none.
ELASTIC = [("ddp", "full"), ("fsdp2", "lora")]


def launch(folder, world_size, cases, place="-"):
    words = [word for engine, what in cases for word in (engine, what, str(place))]
    return run_ranks("trainer_worker.py", world_size, folder, *words)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs in one process, by what is trained."""
    (report,) = launch(tmp_path_factory.mktemp("alone"), 1, [("none", what) for what in WHAT])
    return {what: report[f"none {what} -"] for what in WHAT}


@pytest.fixture(scope="module")
def under_torch(tmp_path_factory):
    """The folder of the runs under torch's engines, and each rank's report."""
    folder = tmp_path_factory.mktemp("torch")
    return folder, launch(folder, 2, TORCH)


@pytest.fixture(scope="module")
def under_zero(tmp_path_factory):
    """The same under DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")
    folder = tmp_path_factory.mktemp("zero")
    return folder, launch(folder, 2, [("zero2_block", "full"), *ZERO])


@pytest.mark.parametrize(
    ("engine", "what", "runs"),
    [(*case, "under_torch") for case in TORCH] + [(*case, "under_zero") for case in ZERO],
)
def test_losses_scales_groups_and_resume_equal_those_of_one_process(request, alone, engine, what, runs):
    expected = alone[what]["whole"]
    _, reports = request.getfixturevalue(runs)
    for report in reports:
        result = report[f"{engine} {what} -"]
        whole = result["whole"]
        assert whole["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert whole["gsnr"] == pytest.approx(expected["gsnr"], rel=1e-6)
        assert len(whole["gsnr"]) == (4 if what == "lora" else 28)
        assert whole["groups"] == expected["groups"]
        assert result["resumed"] == whole


def test_a_deepspeed_config_with_an_optimizer_of_its_own_is_refused(under_zero):
    for report in under_zero[1]:
        message = report["zero2_block full -"]["message"]
        assert "optimizer block (AdamW)" in message
        assert "remove it" in message


def test_one_process_resumes_bit_for_bit(alone):
    for result in alone.values():
        assert result["resumed"] == result["whole"]


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(under_torch, tmp_path):
    place, reports = under_torch
    for world_size in (1, 4):
        for report in launch(tmp_path / str(world_size), world_size, ELASTIC, place):
            for engine, what in ELASTIC:
                check_resumed(report[f"{engine} {what} {place}"]["resumed"], reports[0][f"{engine} {what} -"]["whole"])
    four = tmp_path / "saved_by_4"
    saved = launch(four, 4, ELASTIC)
    for report in launch(tmp_path / "2", 2, ELASTIC, four):
        for engine, what in ELASTIC:
            check_resumed(report[f"{engine} {what} {four}"]["resumed"], saved[0][f"{engine} {what} -"]["whole"])


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(tmp_path):
    place = tmp_path / "dies"
    processes = start_ranks("trainer_worker.py", 2, place, "fsdp2", "lora", "dies")
    run = place / "fsdp2_lora"
    try:
        while not (run / "checkpoint-3" / "trainer_state.json").exists() or not partial(run):
            assert all(process.poll() is None for process in processes), log(place, 0)
            time.sleep(0.0005)
        processes[1].kill()
    finally:
        kill(processes)
    assert partial(run)
    for report in launch(tmp_path / "resumes", 2, [("fsdp2", "lora")], f"killed:{place}"):
        (result,) = report.values()
        assert not partial(run) & {Path(result["checkpoint"])}
        assert result["resumed"] == result["whole"]


def partial(run):
    """The checkpoints that are not whole."""
    return {folder for folder in run.glob("checkpoint-*") if not (folder / "trainer_state.json").exists()}


def check_resumed(resumed, whole):
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert resumed["gsnr"] == whole["gsnr"]
    assert None not in resumed["gsnr"].values()
