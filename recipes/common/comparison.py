"""Put training runs side by side: interleaved step times, a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["interleaved_step_times", "markdown_table", "step_time_ratio"]


def interleaved_step_times(
    optimizers: Mapping[str, torch.optim.Optimizer],
    *,
    rounds: int = 50,
    warmup: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time one step of each optimizer in turn, round after round, so that a busy machine disturbs all alike.

    The order within a round rotates. The parameters must have gradients; they are changed by the steps.

    Args:
        optimizers: Optimizers by name, each with parameters of its own.
        rounds: Measured rounds. Default: 50.
        warmup: Rounds before those, not measured; the first step allocates the state. Default: 5.
        clock: Gives seconds. Default: the wall's. `time.thread_time`, with one thread, leaves out what other work on
            the machine takes.

    Returns:
        Seconds of each measured step, by name; the i-th entries belong to the same round.

    Raises:
        ValueError: If `rounds` is below 1 or `warmup` below 0.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds is {rounds} and warmup is {warmup}; rounds must be at least 1, warmup at least 0.")
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    names = list(optimizers)
    for index in range(warmup + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed_step(optimizers[name], clock)
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def step_time_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratio of two step times that were measured in the same rounds.

    Args:
        seconds: Seconds of one optimizer's steps, at least 2.
        baseline: Seconds of the other's steps in the same rounds.

    Returns:
        `median`, `lower_quartile` and `upper_quartile` of seconds / baseline, round by round.
    """
    ratios = [ours / theirs for ours, theirs in zip(seconds, baseline, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is aligned left, the others right.

    Example:
        >>> print(markdown_table(["optimizer", "eval loss"], [["sgd_sai", "3.10"]]))
        | optimizer | eval loss |
        |:--|--:|
        | sgd_sai | 3.10 |
    """
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(text)


def _timed_step(optimizer: torch.optim.Optimizer, clock: Callable[[], float]) -> float:
    on_cuda = optimizer.param_groups[0]["params"][0].is_cuda
    if on_cuda:
        torch.cuda.synchronize()
    start = clock()
    optimizer.step()
    if on_cuda:
        torch.cuda.synchronize()
    return clock() - start
