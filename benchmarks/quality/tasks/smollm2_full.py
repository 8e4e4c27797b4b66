"""Full fine-tuning of SmolLM2-135M-Instruct on the short docstrings of recipes/llama_lora's benchmark."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from benchmarks.quality.task import Rows, Task, halves

sys.path.append(str(Path(__file__).resolve().parents[3] / "recipes" / "llama_lora"))  # its own imports

from recipes.llama_lora.base_model import load_base
from recipes.llama_lora.instruction_data import load_splits, shorten

__all__ = ["BATCH_SIZE", "CHOOSERS", "STEPS", "make"]

STEPS, BATCH_SIZE, CHOOSERS = 30, 4, 1
MAX_LENGTH, EVALUATED_ROWS = 72, 64


def make() -> Task:
    """All 135 million parameters, 30 steps of 4 rows."""
    model, tokenizer = load_base(ModelConfig(dtype="float32"))
    splits = load_splits(None, None, "train", "validation", 0)
    train = _rows(shorten(splits["train"], tokenizer, MAX_LENGTH, None), tokenizer)
    validation, test = halves(_rows(shorten(splits["validation"], tokenizer, MAX_LENGTH, EVALUATED_ROWS), tokenizer))
    return Task(
        model=lambda: copy.deepcopy(model),
        train=train,
        validation=validation,
        test=test,
        warmup=0.1,
        learning_rate=5e-5,
        schedule="linear",
        evaluations=6,
        shifted=True,
    )


def _rows(chats: Dataset, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Tokens filled up at the right; labels are those of the completion alone."""
    ids = torch.full((len(chats), MAX_LENGTH), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, chat in enumerate(chats):
        prompt = tokenizer.apply_chat_template(chat["prompt"], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_dict=True)
        begin, tokens = len(prompt["input_ids"]), torch.tensor(whole["input_ids"])
        ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
        labels[index, begin : len(tokens)] = tokens[begin:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
