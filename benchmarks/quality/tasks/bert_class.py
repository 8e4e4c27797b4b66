"""A small BERT from scratch tells from which of two packages 32 tokens of code come, as run_glue.py would train it."""

from __future__ import annotations

import torch
from datasets import DatasetDict, concatenate_datasets
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.quality.package_sources import PACKAGES, load_sources
from benchmarks.quality.task import Rows, Task
from recipes.gpt2_pretraining import train as recipe

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "make"]

STEPS, BATCH_SIZE, CHOOSERS = 300, 32, 1
TOKENS = 32
EVALUATED_ROWS = 1024


def make() -> Task:
    """1.1 million parameters, both packages equally often."""
    args = recipe.ScriptArguments(block_size=TOKENS)
    both = [load_sources((package,)) for package in PACKAGES]
    tokenizer = recipe.load_tokenizer(args, concatenate_datasets([own["train"] for own in both]).shuffle(seed=0))
    splits = {split: _rows(both, split, args, tokenizer) for split in ("train", "validation", "test")}
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        pad_token_id=tokenizer.eos_token_id,
    )
    return Task(
        model=lambda: BertForSequenceClassification(config),
        **splits,
        warmup=0.1,
        learning_rate=1e-3,
        schedule="linear",
    )


def _rows(
    both: list[DatasetDict], split: str, args: recipe.ScriptArguments, tokenizer: PreTrainedTokenizerFast
) -> Rows:
    ids = [torch.tensor(recipe.to_blocks(own[split], split, args, tokenizer)["input_ids"][:]) for own in both]
    count = min(map(len, ids))
    if split != "train":
        count = min(count, EVALUATED_ROWS // 2)
    generator = torch.Generator().manual_seed(0)
    ids = [own[torch.randperm(len(own), generator=generator)[:count]] for own in ids]
    return {"input_ids": torch.cat(ids), "labels": torch.arange(2).repeat_interleave(count)}
