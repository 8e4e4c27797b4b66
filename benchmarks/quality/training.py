"""Trains once, as Trainer would: a schedule, clipping at 1, evaluation; the same to the bit for the same seed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler, set_seed

from benchmarks.quality.optimizers import Rival, Settings
from benchmarks.quality.task import Rows, Task
from hf_sai.runs.meters import state_bytes

__all__ = ["batches", "train_once"]

EVALUATED_ROWS = 32  # in one batch


def train_once(
    task: Task,
    rival: Rival,
    settings: Settings,
    seed: int,
    *,
    steps: int,
    batch_size: int,
    report: bool = False,
    timed: bool = False,
) -> dict[str, Any]:
    """Train a new model.

    Args:
        task: What to learn.
        rival: Makes the optimizers.
        settings: Of the optimizers.
        seed: Of the first weights and of the order of the rows.
        steps: How long.
        batch_size: Rows of a step.
        report: Also give the test loss, and the validation loss in the course of training.
        timed: Also give the seconds that the steps took.

    Returns:
        ``eval_loss`` (validation, NaN if training diverged), ``state_bytes``, and what was asked for.
    """
    set_seed(seed)
    model = task.model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = rival.build(model, settings)
    schedule = "constant_with_warmup" if rival.constant else task.schedule
    warmup = round(task.warmup * steps)
    schedulers = [get_scheduler(schedule, optimizer, warmup, steps) for optimizer in optimizers]
    rows = batches(task.train, batch_size, seed)
    curve: list[list[float]] = []
    seconds = 0.0
    _switch(model, optimizers, "train")
    for step in range(1, steps + 1):
        start = time.perf_counter()
        loss = model(**next(rows)).loss
        if not math.isfinite(loss.item()):
            return {"eval_loss": math.nan, "state_bytes": sum(map(state_bytes, optimizers)), "diverged_at": step}
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if report and step < steps and step * task.evaluations // steps > (step - 1) * task.evaluations // steps:
            _switch(model, optimizers, "eval")
            curve.append([step, round(_evaluate(task, model, task.validation)["loss"], 5)])
            _switch(model, optimizers, "train")
    _switch(model, optimizers, "eval")
    result = {"eval_loss": round(_evaluate(task, model, task.validation)["loss"], 5)}
    if report:
        result["curve"] = [*curve, [steps, result["eval_loss"]]]
        result |= {f"test_{name}": round(value, 5) for name, value in _evaluate(task, model, task.test).items()}
    if timed:
        result["train_seconds"] = round(seconds, 2)
    return result | {"state_bytes": sum(map(state_bytes, optimizers))}


def batches(rows: Rows, size: int, seed: int) -> Iterator[Rows]:
    """Rows in a new random order every epoch; what does not fill a batch at an epoch's end is left out."""
    generator = torch.Generator().manual_seed(seed)
    count = len(next(iter(rows.values())))
    while True:
        for index in torch.randperm(count, generator=generator)[: count // size * size].split(size):
            yield {name: column[index] for name, column in rows.items()}


def _switch(model: nn.Module, optimizers: list[torch.optim.Optimizer], mode: str) -> None:
    for part in (model, *optimizers):  # schedule-free optimizers evaluate other weights than they train
        getattr(part, mode, lambda: None)()


@torch.no_grad()
def _evaluate(task: Task, model: nn.Module, rows: Rows) -> dict[str, float]:
    """Mean loss of a target, and the accuracy where each row has one label."""
    total, count, right = 0.0, 0, 0
    names = list(rows)
    for columns in zip(*(rows[name].split(EVALUATED_ROWS) for name in names), strict=True):
        batch = dict(zip(names, columns, strict=True))
        labels = batch["labels"][:, 1:] if task.shifted else batch["labels"]
        targets = int((labels != -100).sum())
        output = model(**batch)
        total, count = total + output.loss.item() * targets, count + targets
        if labels.ndim == 1:
            right += int((output.logits.argmax(-1) == labels).sum())
    accuracy = {"accuracy": right / count} if rows["labels"].ndim == 1 else {}
    return {"loss": total / count, **accuracy}
