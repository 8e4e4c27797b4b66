"""Compares optimizers fairly: all tuned by one rule, chosen on validation rows, reported on other seeds and test rows.

    python benchmarks/quality gpt2                                   # every optimizer; resumes where it was
    python benchmarks/quality gpt2 --optimizers adamw muon orthogonal
    python benchmarks/quality gpt2 --optimizers lion --axes rate     # tunes the learning rate alone
    python benchmarks/quality gpt2 --optimizers orthogonal_8bit --axes none   # tunes nothing
    python benchmarks/quality gpt2 --optimizers adamw --steps 4      # four times as long; starts from what was best
    python benchmarks/quality gpt2 --optimizers adamw --batch_size 2
    python benchmarks/quality gpt2 --table                           # runs nothing

Tasks, each with its minutes a run on one core (the program uses one): gpt2 (2), vit (0.1), llama_code (2), seq2seq (2),
bert_class (1), smollm2_full (3), vit_full (0.1). Settings are chosen by the validation loss of seed 0, or of three
seeds where they differ much (both vit): first the learning rate (by factors of 2 until both neighbours are worse), then
weight decay, betas, momentum one after the other, then the rate again. The best is repeated with the seeds 1 to 5,
which chose nothing, and only these are looked at on the test rows.

Every run is stored at once in `results/TASK/OPTIMIZER.json`, so that several of these processes may run side by side,
each with optimizers of its own. Rivals come from torch, pytorch-optimizer, schedulefree, adam-mini and sgd-sai (extras
`recipes` and `dev`).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks and recipes lie in the repository's root

import torch

from benchmarks.quality.optimizers import RIVALS, VARIANTS
from benchmarks.quality.search import best_settings, choosers, chooses, coordinate_search
from benchmarks.quality.tables import tables
from benchmarks.quality.task import Task
from benchmarks.quality.training import train_once
from recipes.common.candidates import choose
from recipes.common.lr_search import Results
from recipes.common.recipe_input import InputError

TASKS = ("gpt2", "vit", "llama_code", "seq2seq", "bert_class", "smollm2_full", "vit_full")
RESULTS = Path(__file__).with_name("results")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if min(args.steps, args.batch_size or 1) <= 0 or args.seeds < 0:
        raise InputError("--steps and --batch_size must be above 0, and --seeds at least 0.")
    optimizers = RIVALS | VARIANTS
    names = choose(args.optimizers or list(RIVALS), optimizers)
    torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.quality.tasks.{args.task}")
    own = {"steps": module.STEPS, "batch_size": module.BATCH_SIZE}
    where = {"steps": round(args.steps * own["steps"]), "batch_size": args.batch_size or own["batch_size"]}
    files = {name: args.results / args.task / f"{name}.json" for name in optimizers}
    if not args.table:
        task = module.make()
        for name in names:
            tune(name, task, module.CHOOSERS, Results(files[name], task.settings()), own, where, args)
    print(tables({name: Results(file, {}) for name, file in files.items()}, **where))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/quality", description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", help=f"default: {', '.join(RIVALS)}; also {', '.join(VARIANTS)}")
    parser.add_argument("--axes", choices=("all", "rate", "none"), default="all", help="what is tuned")
    parser.add_argument("--seeds", type=int, default=5, help="how many report (default 5)")
    parser.add_argument("--steps", type=float, default=1, help="length, in units of the task's own")
    parser.add_argument("--batch_size", type=int, help="rows of a step (default: the task's own)")
    parser.add_argument("--timed", action="store_true", help="store seconds as well; only on an idle machine")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the runs are stored")
    return parser


def tune(
    name: str,
    task: Task,
    count: int,
    results: Results,
    own: dict[str, int],
    where: dict[str, int],
    args: argparse.Namespace,
) -> None:
    """Search with the seeds that choose, as many as count; repeat the best with those that report."""
    rival = (RIVALS | VARIANTS)[name]
    start = rival.first(task.learning_rate)
    if where != own:
        start = best_settings(results, name, **own) or start

    def run(settings: dict[str, float], seed: int) -> float:
        others = {axis: value for axis, value in settings.items() if axis != "learning_rate"}
        point = {**where, "settings": others}
        known = results.find(name, settings["learning_rate"], seed, **point)
        if not known:
            begin = time.perf_counter()
            made = train_once(task, rival, settings, seed, report=not chooses(seed), timed=args.timed, **where)
            results.add({"candidate": name, "learning_rate": settings["learning_rate"], "seed": seed, **point, **made})
            said = {"learning_rate": settings["learning_rate"], **others, **where, "seed": seed}
            print(
                f"{name}: {said}: {made['eval_loss']:.4f} ({time.perf_counter() - begin:.0f} s)", flush=True
            )  # the seconds tell that it goes on; they are not kept
            known = [made]
        loss: Any = known[0]["eval_loss"]
        return float("nan") if loss is None else loss

    def loss_of(settings: dict[str, float]) -> float:
        return fmean(run(settings, seed) for seed in choosers(count))

    if args.axes == "none":
        loss_of(start)
    else:
        coordinate_search(loss_of, start, rival.all_axes() if args.axes == "all" else {})
    best = best_settings(results, name, **where)
    if best is None:
        print(f"{name}: diverged with every setting that was tried")
        return
    for seed in range(1, args.seeds + 1):
        run(best, seed)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmarks/quality: {problem}")
