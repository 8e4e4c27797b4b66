"""The task of recipes/llama_lora/benchmark.py: SmolLM2-135M-Instruct learns docstrings, 60 steps of 4 rows."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PrinterCallback
from trl import ModelConfig, SFTConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes" / "llama_lora"))  # its own imports

from hf_sai.runs.meters import state_bytes
from recipes.common.candidates import Build
from recipes.common.recipe_input import parse_config_and_flags
from recipes.llama_lora.benchmark import BenchmarkArguments, CompletionTrainer, Task, task_settings

__all__ = ["LEARNING_RATE", "RANK", "STEPS", "SmolLM2"]

LEARNING_RATE, RANK, STEPS = 5e-3, 8, 60
CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "llama_lora" / "benchmark.yaml"
CHOOSING_ROWS = 64  # of validation, as many as the recipe has; the other rows only report


class SmolLM2(Task):
    """The recipe's own model, rows, order, schedule and trainer."""

    def __init__(self) -> None:
        flags = [str(CONFIG), "--results", "", "--max_eval_samples", "1000000"]
        types = (BenchmarkArguments, ModelConfig, SFTConfig)
        args, model_args, training_args = parse_config_and_flags(types, [*flags, "--disable_tqdm", "true"], usage="")
        super().__init__(args, model_args, training_args)
        rows = self.validation.shuffle(seed=0)  # the first 64 are the recipe's
        trainer = CompletionTrainer(
            model=self.adapted(seed=0),
            args=training_args,
            train_dataset=self.train,
            eval_dataset=rows,
            processing_class=self.tokenizer,
        )
        self.train, rows = trainer.train_dataset, trainer.eval_dataset  # tokenized, once for all runs
        self.validation = rows.select(range(CHOOSING_ROWS))
        self.test = rows.select(range(CHOOSING_ROWS, len(rows)))
        varied = {"lora_r", "max_steps", "max_eval_samples"}
        settings = task_settings(args, model_args, training_args)
        self.task = {name: value for name, value in settings.items() if name not in varied}

    def run(
        self, build: Build, lr: float, seed: int, *, rank: int, steps: int, report: bool, constant: bool = False
    ) -> dict[str, Any]:
        """Train once."""
        self.model_args = copy.copy(self.model_args)
        self.model_args.lora_r = rank
        model = self.adapted(seed)
        optimizer = build(model, lr)
        schedule = {"lr_scheduler_type": "constant_with_warmup"} if constant else {}
        trainer = self.trainer(model, optimizer, seed=seed, learning_rate=lr, max_steps=steps, **schedule)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        result = {"eval_loss": trainer.evaluate()["eval_loss"], "train_seconds": round(seconds, 1)}
        if report:
            result["test_loss"] = trainer.evaluate(self.test)["eval_loss"]
        return result | {"state_bytes": state_bytes(optimizer)}

    def trainer(self, model: nn.Module, optimizer: Optimizer, **settings: Any) -> CompletionTrainer:
        """The recipe's trainer with these of its settings changed."""
        trainer = CompletionTrainer(
            model=model,
            args=self.settings(**settings),
            train_dataset=self.train,
            eval_dataset=self.validation,
            processing_class=self.tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
