"""A small T5 from scratch that writes the standard library's docstrings; no optimizer was made or tuned on it."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from benchmarks.quality.task import Rows, Task, halves
from recipes.common.stdlib_corpus import load_docstring_pairs
from recipes.gpt2_pretraining import train as recipe

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "make"]

STEPS, BATCH_SIZE, CHOOSERS = 800, 8, 1
CODE_TOKENS, DOCSTRING_TOKENS = 96, 48


def make() -> Task:
    """1.4 million parameters, 800 steps of 8 functions; what is longer is cut off."""
    pairs = load_docstring_pairs()
    texts = Dataset.from_dict({"text": [*pairs["train"]["code"], *pairs["train"]["docstring"]]})
    tokenizer = recipe.load_tokenizer(recipe.ScriptArguments(), texts)
    tokenizer.pad_token = tokenizer.eos_token
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    validation, test = halves(_rows(pairs["validation"], tokenizer))
    return Task(
        model=lambda: T5ForConditionalGeneration(config),
        train=_rows(pairs["train"], tokenizer),
        validation=validation,
        test=test,
        warmup=0.1,
        learning_rate=4e-3,
    )


def _rows(pairs: Dataset, tokenizer: PreTrainedTokenizerFast) -> Rows:
    columns = {}
    for column, length in (("code", CODE_TOKENS), ("docstring", DOCSTRING_TOKENS)):
        texts = [text + tokenizer.eos_token for text in pairs[column]]
        columns[column] = tokenizer(
            texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        )
    code, docstring = columns["code"], columns["docstring"]
    labels = docstring["input_ids"].masked_fill(docstring["attention_mask"] == 0, -100)
    return {"input_ids": code["input_ids"], "attention_mask": code["attention_mask"], "labels": labels.contiguous()}
