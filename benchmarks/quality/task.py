"""What a task is: a model, rows to train on, rows that choose between settings, and rows that only report."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Rows", "Task", "halves"]

#: Columns by name, as the model's forward calls them; the first dimension counts rows.
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One thing to learn; its module says for how many `STEPS` of which `BATCH_SIZE`, and how many seeds choose.

    Attributes:
        model: Makes the model that training starts from; torch's seed has been set.
        train: Rows to train on.
        validation: Rows that choose between settings.
        test: Rows that are looked at after everything has been chosen.
        warmup: Share of the steps.
        learning_rate: AdamW's usual one here; every grid starts from a multiple of it.
        schedule: Transformers' name of the schedule.
        evaluations: How often the validation loss is looked at in runs that report.
        shifted: Whether labels are compared with the output one place earlier, as causal language models do.
    """

    model: Callable[[], nn.Module]
    train: Rows
    validation: Rows
    test: Rows
    warmup: float
    learning_rate: float
    schedule: str = "cosine"
    evaluations: int = 20
    shifted: bool = False

    def settings(self) -> dict[str, Any]:
        """What must be equal for two runs to be comparable; the data goes in as a checksum."""
        data = 0
        for rows in (self.train, self.validation, self.test):
            for name in sorted(rows):
                data = zlib.crc32(rows[name].contiguous().numpy().tobytes(), data)
        return {"warmup": self.warmup, "schedule": self.schedule, "clip": 1.0, "data": f"{data:08x}"}


def halves(rows: Rows, seed: int = 0) -> tuple[Rows, Rows]:
    """Two random halves, the same whatever the seed of a run."""
    count = len(next(iter(rows.values())))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first, second = order[: count // 2], order[count // 2 :]
    return ({name: column[index] for name, column in rows.items()} for index in (first, second))
