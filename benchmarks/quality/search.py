"""Tunes a rival along one axis after the other: the learning rate, then each other axis, then the rate again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from recipes.common.lr_search import Results

__all__ = ["best_settings", "choosers", "chooses", "coordinate_search"]

#: How often a grid of learning rates may grow by a factor of 2.
GROWTH = 6

Settings = dict[str, float]


def coordinate_search(
    loss_of: Callable[[Settings], float], start: Settings, axes: Mapping[str, tuple[float, ...]]
) -> Settings:
    """The best settings found.

    Args:
        loss_of: Trains with settings and gives the loss; NaN where that diverges.
        start: Settings to start with, ``learning_rate`` among them.
        axes: The values to try of each of the other settings, in this order.

    Example:
        >>> tried = []
        >>> def loss_of(settings):
        ...     tried.append(tuple(settings.values()))
        ...     return abs(settings["learning_rate"] - 4) + abs(settings["momentum"] - 0.8)
        >>> coordinate_search(loss_of, {"learning_rate": 1.0, "momentum": 0.9}, {"momentum": (0.8, 0.9)})
        {'learning_rate': 4.0, 'momentum': 0.8}
        >>> tried[:6]
        [(0.5, 0.9), (1.0, 0.9), (2.0, 0.9), (4.0, 0.9), (8.0, 0.9), (4.0, 0.8)]
    """
    known: dict[tuple[float, ...], float] = {}

    def loss(settings: Settings) -> float:
        key = tuple(settings.values())
        if key not in known:
            value = loss_of(settings)
            known[key] = math.inf if math.isnan(value) else value
        return known[key]

    settings = _best_rate(loss, start)
    for axis, values in axes.items():
        settings = min(({**settings, axis: value} for value in (settings[axis], *values)), key=loss)
    return _best_rate(loss, settings)


def _best_rate(loss: Callable[[Settings], float], settings: Settings) -> Settings:
    """Try the rates a factor of 2 beside the best one until both are worse."""
    for _ in range(GROWTH):
        rate = settings["learning_rate"]
        beside = [{**settings, "learning_rate": float(f"{factor * rate:.3g}")} for factor in (0.5, 1, 2)]
        best = min(beside, key=loss)
        if best["learning_rate"] == rate:
            break
        settings = best
    return settings


def choosers(count: int) -> list[int]:
    """The seeds that choose: 0, 100, 101, ...; the small ones report."""
    return [0, *range(100, 99 + count)]


def chooses(seed: int) -> bool:
    """Whether a seed is one of those that choose."""
    return seed == 0 or seed >= 100


def best_settings(results: Results, rival: str, **task: Any) -> Settings | None:
    """The settings with the lowest mean validation loss of the seeds that choose, or None where none has been tried.

    Only what has been tried with as many seeds as any is compared.

    Args:
        results: Where the runs are.
        rival: Its name.
        task: ``steps`` and ``batch_size``.
    """
    losses: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for run in results.find(rival, **task):
        if chooses(run["seed"]):
            settings = {"learning_rate": run["learning_rate"], **run["settings"]}
            loss = math.inf if run["eval_loss"] is None else run["eval_loss"]
            losses.setdefault(tuple(settings.items()), []).append(loss)
    most = max(map(len, losses.values()), default=0)
    whole = {settings: statistics.fmean(own) for settings, own in losses.items() if len(own) == most}
    best = min(whole, key=lambda settings: whole[settings], default=None)
    return dict(best) if best is not None and whole[best] < math.inf else None
