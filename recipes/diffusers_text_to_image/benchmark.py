"""Compare optimizers on the demo's LoRA, each at its own best learning rate.

    python recipes/diffusers_text_to_image/benchmark.py recipes/diffusers_text_to_image/benchmark.yaml \\
        --results recipes/diffusers_text_to_image/results/benchmark.json

For each candidate the learning rates of its grid are tried with seed 0; while the best lies at an end, the grid grows
there by a factor of 2; the best is repeated with seeds 1 and 2. Every run is written to the results file at once, and
a run that stands there is not repeated. `--candidates name name` runs only these, `--table true` only prints the
table, `--timing true` compares the times of the optimizers' steps.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import prodigyopt
import sgd_sai
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import Arguments, check_arguments
from evaluation import denoising_loss
from image_data import load_splits
from sd_parts import Denoiser, add_lora, load_parts
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from train import Run, encode_all, make_schedule, take_step

from hf_sai import create_sgd_sai_optimizer
from hf_sai.comparison import interleaved_step_times, markdown_table, optimizer_state_bytes, step_time_ratio
from hf_sai.lr_search import Results, results_table, search
from hf_sai.recipe_input import InputError, parse_config_and_flags
from hf_sai.runs.recorder import RunRecorder

BASELINE = "adamw"
TIMED_ROUNDS = 200
TASK = (
    "pretrained_model_name_or_path",
    "emoji_categories",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "per_device_train_batch_size",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "snr_gamma",
)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Candidate:
    """How an optimizer is built from a model and a learning rate, without weight decay, and where its grid starts."""

    build: Callable[[nn.Module, float], Optimizer]
    grid: tuple[float, ...]


def adamw(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0, **options)


def sai(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: create_sgd_sai_optimizer(model, lr=lr, **options)


CANDIDATES = {
    "adamw": Candidate(adamw(), (1e-3, 2e-3, 4e-3, 8e-3)),
    "adamw, beta1 0.8": Candidate(adamw(betas=(0.8, 0.999)), (2e-3, 4e-3, 8e-3)),
    "sgd_sai, factored gradient": Candidate(sai(normalize_gradient="factored"), (2e-3, 4e-3, 8e-3)),
    "sgd_sai, factored gradient, momentum 0.8": Candidate(
        sai(normalize_gradient="factored", momentum=0.8), (2e-3, 4e-3, 8e-3)
    ),
    # 0.1 is what the paper takes for a diffusion LoRA.
    "sgd_sai": Candidate(sai(), (0.0125, 0.025, 0.05, 0.1)),
    "official sgd-sai": Candidate(
        lambda model, lr: sgd_sai.SGD_sai(trainable(model), lr=lr, weight_decay=0.0), (0.025, 0.05, 0.1)
    ),
    "prodigy": Candidate(
        lambda model, lr: prodigyopt.Prodigy(trainable(model), lr=lr, weight_decay=0.0), (0.5, 1.0, 2.0)
    ),
}


@dataclass
class BenchmarkArguments:
    """What to compare, and where the results go; the task comes from train.py's options."""

    results: str = field(metadata={"help": "JSON file of finished runs; it grows."})
    candidates: list[str] | None = field(default=None, metadata={"help": f"Default: all of {', '.join(CANDIDATES)}."})
    rates: list[float] | None = field(default=None, metadata={"help": "Learning rates. Default: the candidate's grid."})
    growth: int = field(default=3, metadata={"help": "How often a grid may grow at its ends."})
    seeds: int = field(default=3, metadata={"help": "Seeds at the best learning rate."})
    timing: bool = field(default=False, metadata={"help": "Train nothing: time the steps of the candidates."})
    table: bool = field(default=False, metadata={"help": "Run nothing: print the table of the results file."})


class Task:
    """The base and the encoded images that all runs share."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.accelerator = Accelerator(cpu=args.use_cpu)
        self.parts = load_parts(args)
        self.data, self.empty = encode_all(load_splits(args), self.parts, args)

    def adapted(self, seed: int) -> Denoiser:
        """The base with a new adapter."""
        set_seed(seed)
        parts = copy.copy(self.parts)
        parts.unet = copy.deepcopy(self.parts.unet)
        add_lora(parts, self.args)
        return Denoiser(parts.unet)

    def train_once(self, candidate: Candidate, lr: float, seed: int) -> dict:
        """Train as train.py does, and return what came out."""
        args = copy.copy(self.args)
        args.seed = seed
        model = self.adapted(seed)
        optimizer = candidate.build(model, lr)
        schedule = make_schedule(optimizer, args)
        prepared = self.accelerator.prepare(model, optimizer)
        with tempfile.TemporaryDirectory() as folder:
            recorder = RunRecorder(folder, main_process=False)
            run = Run(args, self.accelerator, self.parts, self.data, self.empty, *prepared, schedule, recorder)
            start = time.perf_counter()
            run.model.train()
            losses = [take_step(run, step, measure=False)[0].item() for step in range(1, args.max_steps + 1)]
            seconds = time.perf_counter() - start
        self.accelerator.free_memory()
        return {
            "eval_loss": self.evaluate(model),
            "state_bytes": optimizer_state_bytes(optimizer.state_dict()),
            "train_seconds": round(seconds, 1),
            "train_loss": [round(loss, 4) for loss in losses],
        }

    def evaluate(self, model: nn.Module) -> float:
        """The held-out loss, as train.py reports it."""
        size = self.args.per_device_eval_batch_size
        return denoising_loss(model, self.data["validation"], self.parts.noise, self.accelerator.device, size)


def main(argv: list[str] | None = None) -> None:
    options, args = parse_config_and_flags(
        (BenchmarkArguments, Arguments),
        sys.argv[1:] if argv is None else argv,
        usage="benchmark.py CONFIG.yaml --results FILE.json [--key value ...]",
    )
    check_arguments(args)
    names = options.candidates or list(CANDIDATES)
    unknown = sorted(set(names) - set(CANDIDATES))
    if unknown:
        raise InputError(f"no candidate is called {', '.join(unknown)}; choose among {', '.join(CANDIDATES)}.")
    results = Results(options.results, {key: str(getattr(args, key)) for key in TASK})
    if options.timing:
        print(timing_table(Task(args), names))
        return
    if not options.table:
        task = Task(args)
        print(f"eval loss of the base: {task.evaluate(Denoiser(task.parts.unet)):.4f}")
        for name in tqdm(names, desc="optimizers", unit="optimizer"):
            candidate = CANDIDATES[name]
            search(
                name,
                lambda lr, seed, candidate=candidate: task.train_once(candidate, lr, seed),
                options.rates or candidate.grid,
                results,
                growth=options.growth,
                seeds=options.seeds,
                report=lambda run: tqdm.write(
                    f"{run['candidate']}: learning rate {run['learning_rate']:g}, seed {run['seed']}: "
                    f"eval loss {run['eval_loss']:.4f} ({run['train_seconds']:.0f} s)"
                ),
            )
    print(results_table(results, names))


def timing_table(task: Task, names: list[str]) -> str:
    """Time a step of every candidate in turn, on adapters of its own and gradients drawn once."""
    optimizers = {}
    for name in {BASELINE: None, **dict.fromkeys(names)}:
        model = task.adapted(seed=0)
        for parameter in trainable(model):
            parameter.grad = torch.randn_like(parameter)
        optimizers[name] = CANDIDATES[name].build(model, 1e-6)
    seconds = interleaved_step_times(optimizers, rounds=TIMED_ROUNDS)
    rows = []
    for name in names:
        ratio = step_time_ratio(seconds[name], seconds[BASELINE])
        quartiles = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
        rows.append([name, f"{statistics.median(seconds[name]) * 1e3:.2f}", f"{ratio['median']:.2f}", quartiles])
    return markdown_table(["optimizer", "step, ms (median)", f"times {BASELINE}'s", "quartiles"], rows)


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmark.py: {problem}")
