"""A run that was killed after its last checkpoint counts no step twice."""

import json

import pytest
import torch

from hf_sai.runs.record import RECORD_FILE
from hf_sai.runs.recorder import RunRecorder


def test_steps_after_the_checkpoint_are_not_timed_twice(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(recorder, first, last):
        for step in range(first, last + 1):
            with recorder.step():
                pass
            recorder.log(step, {"loss": 1.0})
        recorder.save()

    killed = RunRecorder(tmp_path, budget=1.0)
    killed.start(model, optimizer)
    train(killed, 1, 8)
    before = json.loads((tmp_path / RECORD_FILE).read_text())["timing"]
    resumed = RunRecorder(tmp_path, budget=1.0)
    resumed.start(model, optimizer, step=4)
    at_start = json.loads((tmp_path / RECORD_FILE).read_text())["timing"]
    assert at_start["steps"] == 4
    assert at_start["step_seconds"] == pytest.approx(before["step_seconds"] / 2)
    train(resumed, 5, 8)
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    assert record["timing"]["steps"] == record["run"]["steps"] == 8
