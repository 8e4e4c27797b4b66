"""A small Llama from scratch on the sources of installed packages; no optimizer was made or tuned on it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.package_sources import load_sources
from benchmarks.quality.task import Task
from recipes.gpt2_pretraining import train as recipe

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "make"]

STEPS, BATCH_SIZE, CHOOSERS = 800, 8, 1
EVALUATED_BLOCKS = 256


def make() -> Task:
    """1.2 million parameters, 800 steps of 8 x 128 tokens, with a tokenizer of its own."""
    args = recipe.ScriptArguments()
    documents = load_sources()
    tokenizer = recipe.load_tokenizer(args, documents["train"])
    rows = {}
    for split in ("train", "validation", "test"):
        ids = torch.tensor(recipe.to_blocks(documents[split], split, args, tokenizer)["input_ids"][:])
        if split != "train":  # a part that is the same every time
            ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:EVALUATED_BLOCKS]]
        rows[split] = {"input_ids": ids, "labels": ids}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return Task(
        model=lambda: LlamaForCausalLM(config),
        **rows,
        warmup=0.1,
        learning_rate=4e-3,
        shifted=True,
    )
