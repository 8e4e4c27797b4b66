"""GPT-2 from scratch: recipes/gpt2_pretraining's demo, with its held-out documents in two parts."""

from __future__ import annotations

import torch

from benchmarks.quality.task import Task, halves
from recipes.gpt2_pretraining import train as recipe

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "make"]

STEPS, BATCH_SIZE, CHOOSERS = 800, 8, 1


def make() -> Task:
    """1.1 million parameters on the standard library's documentation; settings as in demo.yaml."""
    args = recipe.ScriptArguments()
    documents = recipe.load_text(args)
    tokenizer = recipe.load_tokenizer(args, documents["train"])
    train, held_out = (
        {"input_ids": ids, "labels": ids}
        for ids in (
            torch.tensor(recipe.to_blocks(documents[split], split, args, tokenizer)["input_ids"][:])
            for split in ("train", "validation")
        )
    )
    validation, test = halves(held_out)
    return Task(
        model=lambda: recipe.load_model(args, tokenizer),
        train=train,
        validation=validation,
        test=test,
        warmup=0.25,
        learning_rate=4e-3,
        shifted=True,
    )
