"""Compare optimizers on the demo's LoRA, each at its own best learning rate.

    python recipes/diffusers_text_to_image/benchmark.py recipes/diffusers_text_to_image/benchmark.yaml \\
        --results recipes/diffusers_text_to_image/results/benchmark.json

For each candidate the learning rates of its grid are tried with seed 0; while the best lies at an end, the grid grows
there by a factor of 2; the best is repeated with seeds 1 and 2, or with `--seeds 5` up to 4. Every run is written to
the results file at once, and a run that stands there is not repeated. `--candidates name name` runs only these,
`--table true` only prints the table, `--timing true` compares the times of the optimizers' steps.
"""

import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import prodigyopt
import sgd_sai
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import Arguments, check_arguments
from evaluation import denoising_loss
from image_data import load_splits
from schedulefree import AdamWScheduleFree
from sd_parts import Denoiser, add_lora, load_parts
from torch import nn
from tqdm.auto import tqdm
from train import Run, encode_all, make_schedule, take_step

from hf_sai.runs.meters import state_bytes
from hf_sai.runs.recorder import RunRecorder
from recipes.common.candidates import Candidate, adamw, choose, sai, timing_table, trainable
from recipes.common.lr_search import Results, SearchArguments, results_table, search, told
from recipes.common.recipe_input import InputError, option, parse_config_and_flags

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


CANDIDATES = {
    "adamw": Candidate(adamw(), (1e-3, 2e-3, 4e-3, 8e-3)),
    "adamw, beta1 0.8": Candidate(adamw(betas=(0.8, 0.999)), (2e-3, 4e-3, 8e-3)),
    "sgd_sai, factored gradient": Candidate(sai(update="factored"), (2e-3, 4e-3, 8e-3)),
    "sgd_sai, factored gradient, momentum 0.8": Candidate(sai(update="factored", momentum=0.8), (2e-3, 4e-3, 8e-3)),
    "sgd_sai, averaged": Candidate(
        sai(update="averaged", momentum=0.8), (2e-3, 4e-3, 8e-3), {"lr_scheduler_type": "constant_with_warmup"}
    ),
    "schedule-free adamw": Candidate(
        lambda model, lr: AdamWScheduleFree(trainable(model), lr=lr),
        (2e-3, 4e-3, 8e-3),
        {"lr_scheduler_type": "constant_with_warmup"},
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
class BenchmarkArguments(SearchArguments):
    """What to compare, and where the results go; the task comes from train.py's options."""

    candidates: list[str] | None = option(None, f"Default: all of {', '.join(CANDIDATES)}.")
    rates: list[float] | None = option(None, "Learning rates. Default: the candidate's grid.")
    timing: bool = option(False, "Train nothing: time the steps of the candidates.")


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
        for name, value in candidate.settings.items():
            setattr(args, name, value)
        model = self.adapted(seed)
        optimizer = candidate.build(model, lr)
        schedule = make_schedule(optimizer, args)
        prepared = self.accelerator.prepare(model, optimizer)
        with tempfile.TemporaryDirectory() as folder:
            recorder = RunRecorder(folder, main_process=False)
            run = Run(args, self.accelerator, self.parts, self.data, self.empty, *prepared, schedule, recorder)
            start = time.perf_counter()
            run.model.train()
            run.optimizer.train()
            losses = [take_step(run, step, measure=False)[0].item() for step in range(1, args.max_steps + 1)]
            seconds = time.perf_counter() - start
            run.optimizer.eval()
        self.accelerator.free_memory()
        return {
            "eval_loss": self.evaluate(model),
            "state_bytes": state_bytes(optimizer),
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
    names = choose(options.candidates, CANDIDATES)
    results = Results(options.results, {key: str(getattr(args, key)) for key in TASK})
    if options.timing:
        task = Task(args)
        print(timing_table(lambda: task.adapted(seed=0), names, CANDIDATES))
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
                report=lambda run: tqdm.write(told(run)),
            )
    print(results_table(results, names))


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmark.py: {problem}")
