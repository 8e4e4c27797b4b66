"""Full fine-tuning of a Vision Transformer: AdamW has trained it on the digits 0 to 4, and it goes on with 5 to 9."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.quality.optimizers import RIVALS
from benchmarks.quality.task import Rows, Task, halves
from benchmarks.quality.tasks.vit import BATCH_SIZE, CHOOSERS, WARMUP, digits, recipe
from benchmarks.quality.training import train_once

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "make"]

PRETRAINING_STEPS, STEPS = 600, 60
PRETRAINED, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def make() -> Task:
    """60 steps with a new head; the pretrained weights are the same whatever the seed of a run."""
    args, known, known_held_out = digits(PRETRAINED)
    torch.manual_seed(0)
    pretrained, _ = recipe.load_model(args, [str(digit) for digit in PRETRAINED])

    def task(model: Callable[[], nn.Module], train: Rows, validation: Rows, test: Rows) -> Task:
        return Task(model, train, validation, test, WARMUP, learning_rate=1e-3)

    before = task(lambda: pretrained, known, known_held_out, known_held_out)
    adamw = RIVALS["adamw"]
    train_once(before, adamw, adamw.first(4e-3), 0, steps=PRETRAINING_STEPS, batch_size=BATCH_SIZE)

    def with_new_head() -> nn.Module:
        model = copy.deepcopy(pretrained)
        model.classifier.reset_parameters()
        return model

    _, train, held_out = digits(NEW)
    return task(with_new_head, train, *halves(held_out))
