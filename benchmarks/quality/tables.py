"""What the runs of a task say: loss on the test rows, steps to AdamW's loss, state, and whether it is chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import ttest_ind

from benchmarks.quality.search import best_settings, chooses
from recipes.common.comparison import markdown_table
from recipes.common.lr_search import Results

__all__ = ["reported", "steps_to", "tables"]

BASELINE = "adamw"


def reported(results: Results, rival: str, **task: Any) -> list[dict[str, Any]]:
    """The runs at a rival's best settings with seeds that chose nothing."""
    best = best_settings(results, rival, **task)
    if best is None:
        return []
    settings = {name: value for name, value in best.items() if name != "learning_rate"}
    runs = results.find(rival, best["learning_rate"], settings=settings, **task)
    return [run for run in runs if not chooses(run["seed"])]


def steps_to(target: float, curve: Sequence[Sequence[float]]) -> float | None:
    """The step at which a loss is reached, on straight lines between evaluations; None if it never is.

    Example:
        >>> steps_to(3.5, [[10, 4.0], [20, 3.0]])
        15.0
    """
    before: Sequence[float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def tables(stores: dict[str, Results], **task: Any) -> str:
    """A line for each rival, the best first, and below it p for every pair (Welch's t-test on the test losses).

    Args:
        stores: Rival to its runs.
        task: ``steps`` and ``batch_size``.
    """
    runs = {name: found for name, store in stores.items() if (found := reported(store, name, **task))}
    whole = {name: own for name, own in runs.items() if all(run["eval_loss"] is not None for run in own)}
    order = sorted(whole, key=lambda name: statistics.mean(_losses(whole[name])))
    base = whole.get(BASELINE)
    target = statistics.mean(run["eval_loss"] for run in base) if base else None
    rows = [_row(name, whole[name], target, base) for name in order]
    rows += [[name, "diverged", *["-"] * 6, _settings(runs[name][0])] for name in runs if name not in whole]
    unreported = {name: best for name, store in stores.items() if name not in runs
                  if (best := best_settings(store, name, **task))}  # fmt: skip
    rows += [[name, "not yet", *["-"] * 6, _shown(best)] for name, best in unreported.items()]
    columns = ["optimizer", "test loss", "accuracy (%)", "seeds", "validation loss", f"steps to {BASELINE}'s loss",
               "state (bytes)", f"p against {BASELINE}", "settings"]  # fmt: skip
    pairs = [[a, *(_p(whole[a], whole[b]) if a != b else "" for b in order)] for a in order]
    parts = [markdown_table(columns, rows)]
    if len(order) > 2:
        parts.append(markdown_table(["p", *order], pairs))
    return "\n\n".join(parts)


def _row(name: str, runs: list[dict[str, Any]], target: float | None, base: list[dict[str, Any]] | None) -> list:
    accuracies = [100 * run["test_accuracy"] for run in runs if "test_accuracy" in run]
    reached = "-"
    if target is not None:
        steps = [steps_to(target, run["curve"]) for run in runs]
        found = [step for step in steps if step is not None]
        reached = f"{statistics.mean(found):.0f}" if found else "never"
        reached += f" ({len(found)} of {len(steps)} seeds)" if 0 < len(found) < len(steps) else ""
    return [
        name,
        _spread(_losses(runs), 4),
        _spread(accuracies, 1) if accuracies else "-",
        len(runs),
        _spread([run["eval_loss"] for run in runs], 4),
        reached,
        f"{runs[0]['state_bytes']:,}",
        _p(runs, base) if base and name != BASELINE else "-",
        _settings(runs[0]),
    ]


def _losses(runs: list[dict[str, Any]]) -> list[float]:
    return [run["test_loss"] for run in runs]


def _p(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    if min(len(ours), len(theirs)) < 2:
        return "-"
    return f"{ttest_ind(_losses(ours), _losses(theirs), equal_var=False).pvalue:.1g}"


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _settings(run: dict[str, Any]) -> str:
    return _shown({"learning_rate": run["learning_rate"], **run["settings"]})


def _shown(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
