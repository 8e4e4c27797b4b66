"""What a benchmark compares: how each optimizer is built from a model and a rate, and how long its step takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_sai import create_sgd_sai_optimizer
from recipes.common.comparison import interleaved_step_times, markdown_table, step_time_ratio
from recipes.common.recipe_input import InputError

__all__ = ["BASELINE", "Build", "Candidate", "adamw", "choose", "sai", "timing_table", "trainable"]

#: The candidate that step times are compared with.
BASELINE = "adamw"
TIMED_ROUNDS = 200

#: Makes an optimizer without weight decay from a model and a learning rate.
Build = Callable[[nn.Module, float], Optimizer]


@dataclass(frozen=True)
class Candidate:
    """An optimizer and its settings.

    Attributes:
        build: Makes the optimizer from the model and a learning rate; weight decay is 0 everywhere.
        grid: Learning rates to start with.
        settings: TrainingArguments that differ from the task's.
    """

    build: Build
    grid: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(**options: Any) -> Build:
    """torch's AdamW with these options."""
    return lambda model, lr: torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0, **options)


def sai(**options: Any) -> Build:
    """SGD-SaI with these options, in hf_sai's groups."""
    return lambda model, lr: create_sgd_sai_optimizer(model, lr=lr, **options)


def choose(names: Sequence[str] | None, candidates: Mapping[str, Any]) -> list[str]:
    """Return the names to compare: those given, or all.

    Raises:
        InputError: There is none of a name.
    """
    unknown = sorted(set(names or ()) - set(candidates))
    if unknown:
        raise InputError(f"no candidate is called {', '.join(unknown)}; choose among {', '.join(candidates)}.")
    return list(names or candidates)


def timing_table(model: Callable[[], nn.Module], names: Sequence[str], candidates: Mapping[str, Candidate]) -> str:
    """Time a step of every candidate in turn, on models of its own and gradients drawn once.

    Args:
        model: Makes a model to train.
        names: Of the candidates.
        candidates: Name to candidate; the baseline is among them.
    """
    optimizers = {}
    for name in {BASELINE: None, **dict.fromkeys(names)}:
        own = model()
        for parameter in trainable(own):
            parameter.grad = torch.randn_like(parameter)
        optimizers[name] = candidates[name].build(own, 1e-6)
        getattr(optimizers[name], "train", lambda: None)()  # schedule-free ones step in no other mode
    seconds = interleaved_step_times(optimizers, rounds=TIMED_ROUNDS)
    rows = []
    for name in names:
        ratio = step_time_ratio(seconds[name], seconds[BASELINE])
        quartiles = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
        rows.append([name, f"{statistics.median(seconds[name]) * 1e3:.2f}", f"{ratio['median']:.2f}", quartiles])
    return markdown_table(["optimizer", "step, ms (median)", f"times {BASELINE}'s", "quartiles"], rows)
