"""Accumulating, clipping, no_sync, recomputing, tied and frozen weights, experts without tokens: as in one process."""

import pytest
from launch import run_ranks

from hf_sai.distributed.stretch import NOT_WHOLE
from hf_sai.optim.rules import RULES

CASES = [
    *((engine, rule) for engine in ("ddp", "fsdp2") for rule in RULES),
    *(("fsdp1", rule) for rule in RULES if rule not in NOT_WHOLE[0]),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    words = [word for case in CASES for word in case]
    return run_ranks("habits_worker.py", 2, tmp_path_factory.mktemp("ranks"), *words)


@pytest.mark.parametrize(("engine", "rule"), CASES)
def test_every_rule_trains_as_in_one_process(runs, engine, rule):
    for result in runs:
        assert result["world_size"] == 2
        case = result[f"{engine} {rule}"]
        assert case["gsnr"] <= 1e-6
        assert case["loss"] <= 1e-5
        assert case["clipped"] >= 10  # of 20 steps
        assert case["parameters"] == case["alone"] == 10  # the tied one once, no frozen one
        assert case["frozen"]
