"""The task and the optimizers that `benchmark.py` and `robustness.py` compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from labelled_images import load_splits
from torch import nn
from torch.optim import Optimizer
from train import ScriptArguments, load_model, make_trainer
from transformers import TrainingArguments, set_seed

from hf_sai import create_sgd_sai_optimizer, param_groups
from hf_sai.runs.meters import state_bytes

__all__ = ["OPTIMIZERS", "Task", "task_settings"]

TASK_SETTINGS = ("max_steps", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps", "max_grad_norm")


def _groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """hf_sai's groups with the keys that every optimizer understands, so that all decay the same parameters."""
    return [
        {"params": [parameter for _, parameter in group["params"]], "weight_decay": group["weight_decay"]}
        for group in param_groups(model, lr=lr, weight_decay=weight_decay)
    ]


#: Name -> what builds the optimizer from a model, a learning rate and a weight decay.
OPTIMIZERS: dict[str, Callable[[nn.Module, float, float], Optimizer]] = {
    "adamw": lambda model, lr, decay: torch.optim.AdamW(_groups(model, lr, decay), lr=lr),
    "sgd_sai": lambda model, lr, decay: create_sgd_sai_optimizer(model, lr=lr, weight_decay=decay),
    "sgd_sai, factored gradient, momentum 0.8": lambda model, lr, decay: create_sgd_sai_optimizer(
        model, lr=lr, weight_decay=decay, update="factored", momentum=0.8
    ),
    "sgd_sai, orthogonal": lambda model, lr, decay: create_sgd_sai_optimizer(
        model, lr=lr, weight_decay=decay, update="orthogonal"
    ),
    "adamw, beta1 0.8": lambda model, lr, decay: torch.optim.AdamW(
        _groups(model, lr, decay), lr=lr, betas=(0.8, 0.999)
    ),
    # Its weight decay is added to the gradient, and its momentum adds up ten gradients where SGD-SaI's averages them.
    "sgd momentum": lambda model, lr, decay: torch.optim.SGD(_groups(model, lr, decay), lr=lr, momentum=0.9),
}


class Task:
    """The data and the settings that all runs share.

    Args:
        args: What to train on.
        training_args: How long, in which batches, with which schedule.
    """

    def __init__(self, args: ScriptArguments, training_args: TrainingArguments) -> None:
        self.args, self.training_args = args, training_args
        self.splits = load_splits(args)
        self.labels = self.splits["train"].features[args.label_column].names

    def train_once(self, optimizer_name: str, lr: float, weight_decay: float, seed: int) -> dict[str, Any]:
        """Train a new model as train.py does, and return what came out."""
        set_seed(seed)
        model, processor = load_model(self.args, self.labels)
        optimizer = OPTIMIZERS[optimizer_name](model, lr, weight_decay)
        training_args = copy.copy(self.training_args)
        training_args.seed = seed
        trainer = make_trainer(self.args, training_args, self.splits, model, processor, [], optimizer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
        return {
            "weight_decay": weight_decay,
            "eval_loss": metrics["eval_loss"],
            "eval_accuracy": metrics["eval_accuracy"],
            "state_bytes": state_bytes(optimizer),
            "train_seconds": round(seconds, 1),
        }


def task_settings(args: ScriptArguments, training_args: TrainingArguments) -> dict[str, str]:
    """Return what must be equal for two runs to be comparable."""
    settings = {key: str(value) for key, value in vars(args).items() if key != "restart"}
    return settings | {key: str(getattr(training_args, key)) for key in TASK_SETTINGS}
