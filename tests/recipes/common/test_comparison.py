"""Comparing runs: rounds of interleaved steps, ratios, tables."""

import pytest
import torch

from recipes.common.comparison import (
    interleaved_step_times,
    markdown_table,
    step_time_ratio,
)


def stepped(optimizer_class, dtype=torch.float32, **options):
    weight = torch.nn.Parameter(torch.zeros(10, 3, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = optimizer_class([weight], lr=0.1, **options)
    optimizer.step()
    return optimizer


def test_steps_are_interleaved_with_rotating_order_and_warmup_is_not_measured(monkeypatch):
    order = []

    class Recorder(torch.optim.SGD):
        def step(self):
            order.append(self.param_groups[0]["lr"])

    optimizers = {name: Recorder([torch.zeros(1)], lr=lr) for name, lr in (("a", 1.0), ("b", 2.0))}
    seconds = interleaved_step_times(optimizers, rounds=2, warmup=1)
    assert order == [1, 2, 2, 1, 1, 2]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_timing_without_rounds_is_refused():
    with pytest.raises(ValueError, match="rounds is 0"):
        interleaved_step_times({"sgd": stepped(torch.optim.SGD)}, rounds=0)


def test_ratio_is_taken_round_by_round():
    assert step_time_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == {
        "median": 0.5,
        "lower_quartile": 0.5,
        "upper_quartile": 0.5,
    }
    assert step_time_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])["median"] == 2.0


def test_table_is_markdown():
    assert markdown_table(["a", "b", "c"], [[1, 2, 3]]) == "| a | b | c |\n|:--|--:|--:|\n| 1 | 2 | 3 |"
