"""Finds each optimizer's own best learning rate on one task, and repeats it with other seeds; may be interrupted."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_sai.runs.files import atomic_write
from recipes.common.comparison import markdown_table
from recipes.common.recipe_input import InputError, option
from recipes.common.result_files import read_json

__all__ = ["Results", "SearchArguments", "results_table", "search", "told"]

#: Trains once with a learning rate and a seed; what it returns is stored, ``eval_loss`` and ``state_bytes`` among it.
TrainOnce = Callable[[float, int], dict[str, Any]]


@dataclass
class SearchArguments:
    """The options that every search has."""

    results: str = field(metadata={"help": "JSON file of finished runs; it grows."})
    growth: int = option(3, "How often a grid may grow at each of its ends.")
    seeds: int = option(3, "Seeds at the best learning rate.")
    table: bool = option(False, "Run nothing: print the table of the results file.")


class Results:
    """The finished runs of a task in a JSON file, found by candidate, learning rate and seed.

    Args:
        path: The file; it grows with every run.
        task: What must be equal for two runs to be comparable.

    Raises:
        InputError: The file holds runs of another task.
    """

    def __init__(self, path: str | Path, task: dict[str, Any]) -> None:
        self.path, self.task = Path(path), task
        self.runs: list[dict[str, Any]] = []
        if self.path.is_file():
            content = read_json(self.path, keys=("task", "runs"))
            known = {"candidate", "learning_rate", "seed", "eval_loss"}
            if not isinstance(content["task"], dict) or not isinstance(content["runs"], list):
                raise InputError(f"{path} is damaged: task must be settings by name, runs a list.")
            if not all(isinstance(run, dict) and known <= set(run) for run in content["runs"]):
                raise InputError(f"{path} is damaged: a run has not all of {', '.join(sorted(known))}.")
            theirs = content["task"]
            different = [f"{key} ({theirs.get(key)})" for key in task if theirs.get(key) != task[key]]
            if different:
                raise InputError(f"{path} holds runs with another {', '.join(different)}: name another file.")
            self.runs = content["runs"]

    def find(
        self, candidate: str, lr: float | None = None, seed: int | None = None, **others: Any
    ) -> list[dict[str, Any]]:
        """The runs of a candidate, of any learning rate or seed where none is given, with these other entries."""
        return [
            run
            for run in self.runs
            if run["candidate"] == candidate
            and lr in (None, run["learning_rate"])
            and seed in (None, run["seed"])
            and all(run.get(key) == value for key, value in others.items())
        ]

    def add(self, run: dict[str, Any]) -> None:
        """Store a run at once; one that diverged has the loss None."""
        if not math.isfinite(run["eval_loss"]):
            run = {**run, "eval_loss": None}
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps({"task": self.task, "runs": self.runs}, indent=1) + "\n")

    def best(self, candidate: str) -> float:
        """The learning rate with the lowest evaluation loss of seed 0."""
        runs = self.find(candidate, seed=0)
        return float(min(runs, key=lambda run: _loss(run))["learning_rate"])


def search(
    candidate: str,
    train_once: TrainOnce,
    grid: Sequence[float],
    results: Results,
    *,
    growth: int = 3,
    factor: float = 2.0,
    refine: bool = False,
    seeds: int = 3,
    report: Callable[[dict[str, Any]], None] = lambda run: None,
) -> None:
    """Run a grid with seed 0, grow it while its best lies at an end, and repeat the best with the other seeds.

    Args:
        candidate: Name of the optimizer; runs that ``results`` has of it are not repeated.
        train_once: Trains once.
        grid: Learning rates to start with.
        results: Where the runs are stored.
        growth: How often the grid may grow at each of its ends.
        factor: How much further each time.
        refine: Also try the rates a factor of sqrt(2) beside the best one.
        seeds: Seeds at the best learning rate: 0, 1, ...
        report: Called with each new run.

    Example:
        >>> import tempfile
        >>> results = Results(tempfile.mkdtemp() + "/results.json", {})
        >>> def train_once(lr, seed):
        ...     return {"eval_loss": (lr - 4) ** 2 + seed, "state_bytes": 8}
        >>> search("parabola", train_once, [1, 2], results, seeds=2)
        >>> [(run["learning_rate"], run["seed"]) for run in results.runs]
        [(1, 0), (2, 0), (4.0, 0), (8.0, 0), (4.0, 1)]
    """

    def run(lr: float, seed: int) -> None:
        if not results.find(candidate, lr, seed):
            made = {"candidate": candidate, "learning_rate": lr, "seed": seed, **train_once(lr, seed)}
            results.add(made)
            report(made)

    rates = sorted(grid)
    for lr in rates:
        run(lr, 0)
    for _ in range(growth):
        best = results.best(candidate)
        if best not in (rates[0], rates[-1]):
            break
        further = best / factor if best == rates[0] else best * factor
        rates = sorted([*rates, float(f"{further:.3g}")])
        for lr in rates:
            run(lr, 0)
    if refine:
        best = results.best(candidate)
        for lr in (best * 2**-0.5, best * 2**0.5):
            run(float(f"{lr:.2g}"), 0)
    for seed in range(seeds):
        run(results.best(candidate), seed)


def results_table(results: Results, candidates: Iterable[str]) -> str:
    """One line a candidate, the best first: mean and standard deviation over seeds, the best rate, and its grid."""
    rows = []
    for name in candidates:
        tried = sorted(results.find(name, seed=0), key=lambda run: run["learning_rate"])
        if not tried:
            continue
        best = results.best(name)
        runs = results.find(name, best)
        losses = [_loss(run) for run in runs]
        mean, spread = statistics.mean(losses), f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        grid = ", ".join(f"{run['learning_rate']:g}: {_shown(run)}" for run in tried)
        rows.append(
            (mean, [name, f"{mean:.4f}{spread}", len(losses), f"{best:g}", grid, f"{runs[0]['state_bytes']:,}"])
        )
    columns = ["optimizer", "eval loss", "seeds", "best lr", "grid (seed 0)", "state (bytes)"]
    return markdown_table(columns, [row for _, row in sorted(rows, key=lambda row: row[0])])


def told(run: dict[str, Any]) -> str:
    """One line about a run that has just ended."""
    accuracy = f", accuracy {100 * run['eval_accuracy']:.2f} %" if "eval_accuracy" in run else ""
    return (
        f"{run['candidate']}: learning rate {run['learning_rate']:g}, seed {run['seed']}: "
        f"eval loss {run['eval_loss']:.4f}{accuracy} ({run['train_seconds']:.0f} s)"
    )


def _loss(run: dict[str, Any]) -> float:
    return math.inf if run["eval_loss"] is None else float(run["eval_loss"])


def _shown(run: dict[str, Any]) -> str:
    return "diverged" if run["eval_loss"] is None else f"{run['eval_loss']:.4f}"
