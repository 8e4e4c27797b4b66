"""A GPT of 2 layers on bytes, which AdamW has trained on documentation, learns the sources of packages with LoRA."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.gap import BYTES, CONTEXT, HEADS, LAYERS, WIDTH, load_rows
from benchmarks.quality.optimizers import RIVALS, Rival
from benchmarks.quality.package_sources import load_sources
from benchmarks.quality.task import Rows, Task
from benchmarks.quality.training import train_once
from recipes.common.candidates import Build

__all__ = ["LEARNING_RATE", "RANK", "STEPS", "ByteModel"]

LEARNING_RATE, RANK, STEPS = 8e-3, 8, 100
PRETRAINING_STEPS, PRETRAINING_RATE, BATCH_SIZE = 1200, 4e-3, 8
ALPHA, EVALUATED_ROWS = 16, 256
MATRICES = ["c_attn", "c_proj", "c_fc"]


class ByteModel:
    """100,000 frozen weights; adapters on every matrix of its layers."""

    def __init__(self) -> None:
        config = GPT2Config(
            vocab_size=BYTES, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        self.base = GPT2LMHeadModel(config)
        known, held_out = (_columns(rows) for rows in load_rows())
        before = _task(lambda: self.base, known, held_out, held_out)
        adamw = RIVALS["adamw"]
        train_once(before, adamw, adamw.first(PRETRAINING_RATE), 0, steps=PRETRAINING_STEPS, batch_size=2 * BATCH_SIZE)
        sources = load_sources()
        train, *held_out = (_blocks(sources[split]) for split in ("train", "validation", "test"))
        self.rows = [_columns(rows) for rows in (train, *(rows[:EVALUATED_ROWS] for rows in held_out))]
        self.task = self._adapting(RANK).settings() | {"alpha": ALPHA, "batch_size": BATCH_SIZE}

    def run(
        self, build: Build, lr: float, seed: int, *, rank: int, steps: int, report: bool, constant: bool = False
    ) -> dict[str, Any]:
        """Train once."""
        rival = Rival(lambda model, settings: [build(model, settings["learning_rate"])], {}, {}, constant=constant)
        settings = {"learning_rate": lr}
        begin = time.process_time()
        made = train_once(
            self._adapting(rank), rival, settings, seed, steps=steps, batch_size=BATCH_SIZE, report=report
        )
        return made | {"train_seconds": round(time.process_time() - begin, 1)}

    def _adapting(self, rank: int) -> Task:
        lora = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=MATRICES, fan_in_fan_out=True)
        return _task(lambda: get_peft_model(copy.deepcopy(self.base), lora), *self.rows)


def _task(model: Callable[[], nn.Module], train: Rows, validation: Rows, test: Rows) -> Task:
    return Task(model, train, validation, test, 0.1, PRETRAINING_RATE, schedule="linear", evaluations=1, shifted=True)


def _columns(rows: Tensor) -> Rows:
    return {"input_ids": rows, "labels": rows}


def _blocks(split: Dataset) -> Tensor:
    """Bytes in rows, in an order that is the same every time."""
    text = torch.frombuffer(bytearray("\n\n".join(split["text"]).encode()), dtype=torch.uint8).long()
    rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
