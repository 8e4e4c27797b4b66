"""Compare optimizers on one task, each at its own best learning rate.

    python recipes/vit_classification/benchmark.py recipes/vit_classification/benchmark.yaml \\
        --results recipes/vit_classification/results/benchmark.json

For each optimizer the learning rates of its grid are tried with seed 0; while the best lies at an end, the grid grows
there by a factor of 2; the best is repeated with seeds 1 and 2. Every run is written to the results file at once, and
a run that stands there is not repeated. `--optimizers name name` runs only these, `--table true` only prints the table.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

from tqdm.auto import tqdm
from train import ScriptArguments, check_arguments
from transformers import TrainingArguments
from vit_task import OPTIMIZERS, Task, task_settings

from recipes.common.candidates import choose
from recipes.common.comparison import markdown_table
from recipes.common.lr_search import Results, SearchArguments, search, told
from recipes.common.recipe_input import InputError, option, parse_config_and_flags

GRIDS = {
    "adamw": (2e-3, 4e-3, 8e-3),
    "sgd_sai": (2e-2, 4e-2, 8e-2),
    "sgd_sai, factored gradient, momentum 0.8": (2e-3, 4e-3, 8e-3),
    "sgd_sai, orthogonal": (8e-3, 16e-3, 32e-3),
    "adamw, beta1 0.8": (2e-3, 4e-3, 8e-3),
    "sgd momentum": (2e-2, 4e-2, 8e-2),
}


@dataclass
class BenchmarkArguments(SearchArguments):
    """What to compare, and where the results go; the task comes from train.py's options."""

    optimizers: list[str] | None = option(None, f"Default: {', '.join(OPTIMIZERS)}.")


def main(argv: list[str] | None = None) -> None:
    options, args, training_args = parse_config_and_flags(
        (BenchmarkArguments, ScriptArguments, TrainingArguments),
        sys.argv[1:] if argv is None else argv,
        usage="benchmark.py CONFIG.yaml --results FILE.json [--key value ...]",
    )
    check_arguments(args)
    names = choose(options.optimizers, OPTIMIZERS)
    decay = training_args.weight_decay
    results = Results(options.results, task_settings(args, training_args) | {"weight_decay": str(decay)})
    if not options.table:
        task = Task(args, training_args)
        for name in tqdm(names, desc="optimizers", unit="optimizer"):
            search(
                name,
                lambda lr, seed, name=name: task.train_once(name, lr, decay, seed),
                GRIDS[name],
                results,
                growth=options.growth,
                seeds=options.seeds,
                report=lambda run: tqdm.write(told(run)),
            )
    print(table(results, names))


def table(results: Results, names: list[str]) -> str:
    """One line an optimizer: at its best learning rate, accuracy and loss over the seeds; and the grid."""
    rows = []
    for name in names:
        tried = sorted(results.find(name, seed=0), key=lambda run: run["learning_rate"])
        if tried:
            best = results.best(name)
            runs = results.find(name, best)
            accuracies = [100 * run["eval_accuracy"] for run in runs]
            losses = [run["eval_loss"] for run in runs]
            grid = ", ".join(f"{run['learning_rate']:g}: {_shown(run['eval_loss'])}" for run in tried)
            state = f"{runs[0]['state_bytes']:,}"
            rows.append([name, f"{best:g}", _spread(accuracies, 2), _spread(losses, 4), len(runs), grid, state])
    columns = ["optimizer", "best lr", "accuracy (%)", "eval loss", "seeds", "grid: eval loss, seed 0", "state (bytes)"]
    return markdown_table(columns, rows)


def _spread(values: list[float | None], digits: int) -> str:
    if None in values:
        return "diverged"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmark.py: {problem}")
