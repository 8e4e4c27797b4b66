"""Compare optimizers on one LoRA task, each at its own best learning rate.

    python recipes/llama_lora/benchmark.py recipes/llama_lora/benchmark.yaml \\
        --results recipes/llama_lora/results/benchmark.json

For each candidate the learning rates of its grid are tried with seed 0. While the best one lies at an end of the grid,
the grid grows there by a factor of 2; then the rates a factor of sqrt(2) beside the best are tried, and the best of all
is repeated with seeds 1 and 2. Every run is written to the results file at once, and a run that stands there is not
repeated. `--candidates name name` runs only these; `--timing true` compares the times of their steps instead.
"""

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import torch
from base_model import OFFLINE_MODEL, add_lora, load_base
from candidates import CANDIDATES
from datasets import Dataset
from frozen_prefix import with_frozen_prefix
from instruction_data import load_splits, shorten
from tqdm.auto import tqdm
from transformers import set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

from hf_sai.runs.meters import state_bytes
from recipes.common.candidates import Candidate, choose, timing_table
from recipes.common.lr_search import Results, SearchArguments, results_table, search, told
from recipes.common.recipe_input import InputError, option, parse_config_and_flags

TASK_SETTINGS = (
    "max_length",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "weight_decay",
)


@dataclass
class BenchmarkArguments(SearchArguments):
    """What to compare, and where the results go; the task comes from TRL's options."""

    candidates: list[str] | None = option(None, f"Default: all of {', '.join(CANDIDATES)}.")
    max_eval_samples: int = option(64, "Rows of validation to evaluate on.")
    adapted_layers: int = option(10, "How many layers have adapters, at the model's top.")
    refine: bool = option(True, "Try a factor of sqrt(2) beside the best learning rate.")
    timing: bool = option(False, "Train nothing: time the steps of the candidates.")


class CompletionTrainer(SFTTrainer):
    """SFTTrainer with the same loss at half the cost on a CPU: no logits where no row of the batch has a completion."""

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets = inputs["labels"][:, 1:]
        positions = (targets != -100).any(0).nonzero().squeeze(1)
        targets = targets[:, positions]
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=positions
        ).logits
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss


class Task:
    """The model, the data and the settings that all runs share."""

    def __init__(self, args: BenchmarkArguments, model_args: ModelConfig, training_args: SFTConfig) -> None:
        self.model_args, self.training_args = model_args, training_args
        base, self.tokenizer = load_base(model_args)
        self.base = with_frozen_prefix(base, args.adapted_layers, self.tokenizer.pad_token_id)
        splits = load_splits(None, None, "train", "validation", 0)
        self.train = shorten(splits["train"], self.tokenizer, training_args.max_length, None)
        self.validation: Dataset = shorten(
            splits["validation"], self.tokenizer, training_args.max_length, args.max_eval_samples
        )

    def adapted(self, seed: int) -> torch.nn.Module:
        set_seed(seed)
        return add_lora(copy.deepcopy(self.base), self.model_args)

    def settings(self, **changes: Any) -> SFTConfig:
        args = copy.copy(self.training_args)
        for key, value in changes.items():
            setattr(args, key, value)
        return args

    def train_once(self, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
        """Train once and return what came out."""
        model = self.adapted(seed)
        optimizer = candidate.build(model, lr)
        trainer = CompletionTrainer(
            model=model,
            args=self.settings(seed=seed, learning_rate=lr, **candidate.settings),
            train_dataset=self.train,
            eval_dataset=self.validation,
            processing_class=self.tokenizer,
            optimizers=(optimizer, None),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "eval_loss": trainer.evaluate()["eval_loss"],
            "state_bytes": state_bytes(optimizer),
            "train_seconds": round(seconds, 1),
            "train_loss": [round(entry["loss"], 4) for entry in losses],
            "grad_norm": [round(float(entry["grad_norm"]), 4) for entry in losses],
        }


def main(argv: list[str] | None = None) -> None:
    args, model_args, training_args = parse_config_and_flags(
        (BenchmarkArguments, ModelConfig, SFTConfig),
        sys.argv[1:] if argv is None else argv,
        usage="benchmark.py CONFIG.yaml --results FILE.json [--key value ...]",
    )
    names = choose(args.candidates, CANDIDATES)
    results = Results(args.results, task_settings(args, model_args, training_args))
    if args.timing:
        task = Task(args, model_args, training_args)
        print(timing_table(lambda: task.adapted(seed=0), names, CANDIDATES))
        return
    if not args.table:
        task = Task(args, model_args, training_args)
        for name in tqdm(names, desc="optimizers", unit="optimizer"):
            candidate = CANDIDATES[name]
            search(
                name,
                lambda lr, seed, candidate=candidate: task.train_once(candidate, lr, seed),
                candidate.grid,
                results,
                growth=args.growth,
                refine=args.refine,
                seeds=args.seeds,
                report=lambda run: tqdm.write(told(run)),
            )
    print(results_table(results, names))


def task_settings(args: BenchmarkArguments, model_args: ModelConfig, training_args: SFTConfig) -> dict[str, Any]:
    """What must be equal for two runs to be comparable."""
    return {
        "model": model_args.model_name_or_path or OFFLINE_MODEL,
        **{key: getattr(args, key) for key in ("adapted_layers", "max_eval_samples")},
        **{key: getattr(model_args, key) for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")},
        **{key: str(getattr(training_args, key)) for key in TASK_SETTINGS},
    }


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmark.py: {problem}")
