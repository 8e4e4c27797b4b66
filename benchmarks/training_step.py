"""Time whole training steps of the recipes' demos: forward, backward and clipping, then the optimizer's own step.

    python benchmarks/training_step.py --output docs/research/training_step.json     # all four
    python benchmarks/training_step.py gpt2 vit --rounds 10 --optimizers adamw orthogonal

Every optimizer trains a model of its own from the same seed, and all take their steps in turn. The gradients are the
same work for each, so that the median over all counts. Times are the processor's, on one thread, which leaves out what
else the machine does.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import logging
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks and recipes lie in the repository's root

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.quality.optimizers import RIVALS
from benchmarks.quality.training import batches
from benchmarks.step_speed import installed, processor
from hf_sai.runs.files import atomic_write
from recipes.common.candidates import choose
from recipes.common.comparison import markdown_table
from recipes.common.recipe_input import InputError, parse_config_and_flags

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "adamw"
OPTIMIZERS = ("adamw", "published", "factored", "averaged", "orthogonal", "muon", "schedule_free")
LEARNING_RATE = 1e-6  # models stay what they are
#: Optimizers of hidden matrices, of which an adapter has none.
OF_MATRICES = {"orthogonal", "muon"}
WARMUP = 3  # rounds that do not count: states are allocated, kernels compiled

#: A new model of a task, and the losses of its training batches, to be differentiated one after the other.
Start = Callable[[], tuple[nn.Module, Iterator[Tensor]]]


def from_scratch(name: str) -> Start:
    """A task of benchmarks/quality, which are the recipes' demos."""
    module = importlib.import_module(f"benchmarks.quality.tasks.{name}")
    task = module.make()

    def start() -> tuple[nn.Module, Iterator[Tensor]]:
        model = task.model()
        return model, (model(**rows).loss for rows in batches(task.train, module.BATCH_SIZE, seed=0))

    return start


def language_lora() -> Start:
    """recipes/llama_lora's benchmark: SmolLM2, of whose frozen layers the outputs are kept."""
    from benchmarks.lora_rules.smollm2 import SmolLM2

    task = SmolLM2()

    def start() -> tuple[nn.Module, Iterator[Tensor]]:
        model = task.adapted(seed=0)
        trainer = task.trainer(model, torch.optim.SGD(model.parameters()))
        loader = trainer.get_train_dataloader()
        return model, (trainer.compute_loss(model, rows) for _ in count() for rows in loader)

    return start


def diffusion_lora() -> Start:
    """recipes/diffusers_text_to_image's benchmark."""
    folder = ROOT / "recipes" / "diffusers_text_to_image"
    sys.path.insert(0, str(folder))  # its own imports
    from arguments import Arguments, check_arguments
    from train import Run, training_loss
    from train import batches as rows_of

    from recipes.diffusers_text_to_image.benchmark import Task

    (args,) = parse_config_and_flags((Arguments,), [str(folder / "benchmark.yaml")], usage="")
    check_arguments(args)
    task = Task(args)

    def start() -> tuple[nn.Module, Iterator[Tensor]]:
        model = task.adapted(seed=0)
        run: Any = Run(args, task.accelerator, task.parts, task.data, task.empty, model, None, None, None)
        return model, (training_loss(run, rows) for step in count(1) for rows in rows_of(run, step))

    return start


TASKS: dict[str, Callable[[], Start]] = {
    "gpt2": partial(from_scratch, "gpt2"),
    "vit": partial(from_scratch, "vit"),
    "llama_lora": language_lora,
    "diffusers_lora": diffusion_lora,
}
ADAPTERS = {"llama_lora", "diffusers_lora"}


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.rounds < 1:
        raise InputError(f"--rounds is {args.rounds}, and must be at least 1.")
    names = choose(args.optimizers, RIVALS)
    if BASELINE not in names:
        raise InputError(f"--optimizers must contain {BASELINE}, over which all times are shown.")
    if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise InputError(f"--output is {args.output}, and must be a file in a folder that is there.")
    torch.set_num_threads(1)
    report = {"environment": environment(argv), "tasks": {}}
    for task in choose(args.tasks or list(TASKS), TASKS):
        own = [name for name in names if not (task in ADAPTERS and name in OF_MATRICES)]
        report["tasks"][task] = measure(TASKS[task](), own, args.rounds)
        if left_out := set(names) - set(own):
            print(f"{task}: an adapter has no hidden matrices for {', '.join(sorted(left_out))}; left out")
        if args.output:
            atomic_write(args.output, json.dumps(report, indent=1) + "\n")
    print(table(report))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/training_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} (default: all)")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, help="those of benchmarks/quality")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that count (default 20)")
    parser.add_argument("--output", type=Path, help="a file for the seconds, as JSON")
    return parser


def measure(start: Start, names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of a step's gradients, and of each optimizer's own part, medians of the rounds."""
    ways = {}
    for name in names:
        set_seed(0)
        model, losses = start()
        ways[name] = model, losses, RIVALS[name].build(model, RIVALS[name].first(LEARNING_RATE))
    gradients: list[float] = []
    updates: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(WARMUP + rounds), "rounds", leave=False):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times = _timed(*ways[name])
            if index >= WARMUP:
                gradients.append(times[0])
                updates[name].append(times[1])
    return {
        "gradient_seconds": statistics.median(gradients),
        "update_seconds": {name: statistics.median(own) for name, own in updates.items()},
    }


def _timed(model: nn.Module, losses: Iterator[Tensor], optimizers: list[torch.optim.Optimizer]) -> tuple[float, float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for part in (model, *optimizers):
        getattr(part, "train", lambda: None)()  # schedule-free ones step in no other mode
    begin = time.process_time()
    next(losses).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    between = time.process_time()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return between - begin, time.process_time() - between


def table(report: dict[str, Any]) -> str:
    """The whole step over AdamW's, and in brackets the share of it that is the optimizer's own."""
    tasks = report["tasks"]
    names = dict.fromkeys(name for found in tasks.values() for name in found["update_seconds"])
    rows = []
    for name in names:
        cells = []
        for task, found in tasks.items():
            own, gradients = found["update_seconds"].get(name), found["gradient_seconds"]
            cells.append(f"{ratio(report, task, name):.2f} ({own / (gradients + own):.0%})" if own else "-")
        rows.append([name, *cells])
    return markdown_table(["optimizer", *tasks], rows)


def ratio(report: dict[str, Any], task: str, name: str) -> float:
    """An optimizer's whole step over AdamW's."""
    found = report["tasks"][task]
    gradients, updates = found["gradient_seconds"], found["update_seconds"]
    return (gradients + updates[name]) / (gradients + updates[BASELINE])


def environment(argv: list[str] | None) -> dict[str, str]:
    """Hardware, versions, date and command."""
    return {
        "command": "python benchmarks/training_step.py " + shlex.join(sys.argv[1:] if argv is None else argv),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "transformers", "numba")},
    }


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmarks/training_step.py: {problem}")
