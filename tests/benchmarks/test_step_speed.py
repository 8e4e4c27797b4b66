"""The benchmark of the step: what is installed is timed beside AdamW, and tables and pictures are written."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "step_speed.py"


@pytest.fixture
def step_speed():
    spec = importlib.util.spec_from_file_location("step_speed", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_measures_and_writes_what_it_measured(step_speed, tmp_path, monkeypatch):
    monkeypatch.setattr(
        step_speed, "shapes_of", lambda model: [("h.0.weight", torch.Size([64, 80])), ("b", torch.Size([9]))]
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setitem(step_speed.OPTIMIZERS, "Adam-mini", lambda named: 1 / 0)
    names = ["SGD-SaI, fused", "SGD-SaI, 8-bit momentum", "official sgd-sai", "Adam-mini"]
    step_speed.main(["gpt2", "--output", str(tmp_path / "speed"), "--rounds", "3", "--clock", "cpu", "--only", *names])

    report = json.loads((tmp_path / "speed.json").read_text())
    (model,) = report["models"]
    assert model["parameters"] == 64 * 80 + 9
    rows = {row["optimizer"]: row for row in model["rows"]}
    assert set(rows) == {"torch AdamW, fused", *names} - {"Adam-mini"}
    assert model["skipped"] == {"Adam-mini": "ZeroDivisionError: division by zero"}
    assert rows["torch AdamW, fused"]["ratio"]["median"] == 1
    assert rows["torch AdamW, fused"]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert rows["SGD-SaI, fused"]["state_bytes_per_parameter"] == pytest.approx(4, abs=0.01)
    assert all(row["median_seconds"] > 0 for row in rows.values())
    text = (tmp_path / "speed.md").read_text()
    assert "SGD-SaI, 8-bit momentum" in text
    assert "Not measured: Adam-mini (ZeroDivisionError: division by zero)" in text
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_model_may_be_cut_to_its_first_layers_or_split_evenly(step_speed):
    shapes = dict(step_speed.shapes_of("gpt2:2"))
    assert "transformer.wte.weight" in shapes
    assert {name.split(".")[2] for name in shapes if ".h." in name} == {"0", "1"}
    assert step_speed.shapes_of("split-1024") == [(f"tensor{i}", (2**14,)) for i in range(1024)]
