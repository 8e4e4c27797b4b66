"""The search for each optimizer's own learning rate: it grows its grid, repeats nothing, and survives interruptions."""

import json
import math

import pytest

from recipes.common.lr_search import Results, results_table, search
from recipes.common.recipe_input import InputError


def parabola(calls, best=0.1):
    def train_once(lr, seed):
        calls.append((lr, seed))
        return {"eval_loss": math.log(lr / best) ** 2 + 0.01 * seed, "state_bytes": 4}

    return train_once


def test_grid_grows_towards_the_best_and_the_best_is_repeated(tmp_path):
    calls = []
    search("x", parabola(calls), [0.01, 0.02], Results(tmp_path / "r.json", {}))
    assert calls == [(0.01, 0), (0.02, 0), (0.04, 0), (0.08, 0), (0.16, 0), (0.08, 1), (0.08, 2)]


def test_grid_stops_growing_after_so_many_times(tmp_path):
    calls = []
    search("x", parabola(calls, best=1e-9), [1.0, 2.0], Results(tmp_path / "r.json", {}), growth=2, seeds=1)
    assert [lr for lr, _ in calls] == [1.0, 2.0, 0.5, 0.25]


def test_refining_tries_the_rates_beside_the_best(tmp_path):
    calls = []
    search("x", parabola(calls, best=0.14), [0.05, 0.1, 0.2], Results(tmp_path / "r.json", {}), refine=True, seeds=2)
    assert calls == [(0.05, 0), (0.1, 0), (0.2, 0), (0.071, 0), (0.14, 0), (0.14, 1)]


def test_interrupted_search_goes_on_without_repeating_a_run(tmp_path):
    calls = []

    def breaks(lr, seed):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return parabola(calls)(lr, seed)

    with pytest.raises(KeyboardInterrupt):
        search("x", breaks, [0.05, 0.1, 0.2], Results(tmp_path / "r.json", {"steps": 3}))
    search("x", parabola(calls), [0.05, 0.1, 0.2], Results(tmp_path / "r.json", {"steps": 3}))
    assert calls == [(0.05, 0), (0.1, 0), (0.2, 0), (0.1, 1), (0.1, 2)]


def test_runs_of_another_task_are_refused(tmp_path):
    Results(tmp_path / "r.json", {"steps": 3}).add(
        {"candidate": "x", "learning_rate": 1, "seed": 0, "eval_loss": 1.0, "state_bytes": 1}
    )
    with pytest.raises(InputError, match=r"holds runs with another steps \(3\): name another file"):
        Results(tmp_path / "r.json", {"steps": 4})


def test_diverged_runs_are_stored_as_valid_json_and_never_best(tmp_path):
    results = Results(tmp_path / "r.json", {})
    search("x", lambda lr, seed: {"eval_loss": math.nan if lr > 1 else lr, "state_bytes": 4}, [0.5, 1, 2], results)
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert results.best("x") < 1
    assert "2: diverged" in results_table(results, ["x"])


def test_table_has_mean_and_spread_of_the_seeds_and_the_best_first(tmp_path):
    results = Results(tmp_path / "r.json", {})
    for name, losses in (("worse", (3.0, 5.0)), ("better", (1.0, 2.0))):
        for seed, loss in enumerate(losses):
            results.add({"candidate": name, "learning_rate": 1, "seed": seed, "eval_loss": loss, "state_bytes": 1000})
    lines = results_table(results, ["worse", "better", "never run"]).splitlines()
    assert lines[2] == "| better | 1.5000 ± 0.7071 | 2 | 1 | 1: 1.0000 | 1,000 |"
    assert lines[3].startswith("| worse | 4.0000 ± 1.4142")
    assert len(lines) == 4
