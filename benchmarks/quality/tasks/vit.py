"""A Vision Transformer from scratch: recipes/vit_classification's benchmark, its held-out digits in two parts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.quality.task import Rows, Task, halves

sys.path.append(str(Path(__file__).resolve().parents[3] / "recipes" / "vit_classification"))  # its own imports

from recipes.vit_classification import train as recipe

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "WARMUP", "digits", "make"]

STEPS, WARMUP, BATCH_SIZE = 150, 0.1, 32  # as in benchmark.yaml
CHOOSERS = 3


def digits(classes: tuple[int, ...] = tuple(range(10))) -> tuple[recipe.ScriptArguments, Rows, Rows]:
    """The recipe's arguments, and the pixels and labels of its two splits; labels count within the classes."""
    args = recipe.ScriptArguments(crop_scale=1.0)
    splits = recipe.load_splits(args)
    _, processor = recipe.load_model(args, [str(name) for name in classes])
    collate = recipe.Collator(processor)
    rows = []
    for split in ("train", "validation"):
        side = recipe.side_length(processor) if split == "train" else None
        views = recipe.PictureViews(splits[split], args, side=side)
        batch = collate([views[index] for index in range(len(views)) if views.labels[index] in classes])
        rows.append({**batch, "labels": torch.tensor([classes.index(label) for label in batch["labels"].tolist()])})
    return args, *rows


def make() -> Task:
    """100,000 parameters, 150 steps of 32 digits."""
    args, train, held_out = digits()
    validation, test = halves(held_out)
    return Task(
        model=lambda: recipe.load_model(args, [str(digit) for digit in range(10)])[0],
        train=train,
        validation=validation,
        test=test,
        warmup=WARMUP,
        learning_rate=4e-3,
    )
