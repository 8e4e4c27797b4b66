"""``--optim sgd_sai`` in Trainer, with PEFT and without: the run and its resume do not depend on the engine."""

import importlib.util

import pytest
from launch import run_ranks

MODES = [("ddp", "full"), ("ddp", "lora"), ("fsdp2", "lora"), ("zero2", "full"), ("zero3", "lora")]
TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, by what is trained."""
    return {
        what: run_ranks("trainer_worker.py", 1, tmp_path_factory.mktemp(what), "ddp", what)[0]
        for what in ("full", "lora")
    }


@pytest.mark.parametrize(("engine", "what"), MODES)
def test_losses_scales_groups_and_resume_equal_those_of_one_process(alone, tmp_path, engine, what):
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")
    expected = alone[what]
    for result in run_ranks("trainer_worker.py", 2, tmp_path, engine, what):
        assert result["type"] == TYPES[engine]
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["gsnr"] == pytest.approx(expected["gsnr"], rel=1e-5)
        assert len(result["gsnr"]) == (28 if what == "full" else 4)
        assert result["groups"] == expected["groups"]
        assert result["resumed_losses"] == result["losses"]
        assert result["resumed_gsnr"] == result["gsnr"]
