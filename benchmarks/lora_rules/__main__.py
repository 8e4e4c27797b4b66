"""Does a rule made for LoRA's A and B beat AdamW? Every candidate at its own learning rate, on two tasks.

    python benchmarks/lora_rules smollm2                                       # every candidate
    python benchmarks/lora_rules smollm2 --candidates adamw factored orthogonal
    python benchmarks/lora_rules smollm2 --candidates factored --rank 64 --seeds 0
    python benchmarks/lora_rules bytes --steps 300
    python benchmarks/lora_rules smollm2 --table                               # runs nothing

`smollm2` is the task of recipes/llama_lora/benchmark.py, `bytes` a model of 100,000 weights. The learning rate is
chosen by the validation loss of seed 0, in steps of a factor of 2 until both neighbours are worse. It is repeated with
the seeds 1, 2 and so on, and only these are looked at on test rows. Every run is stored at once in `results/`, in a
file for each task, rank and number of steps, and is not repeated.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

import torch
from scipy.stats import ttest_rel

from benchmarks.lora_rules.rules import CANDIDATES
from recipes.common.candidates import choose
from recipes.common.comparison import markdown_table
from recipes.common.lr_search import Results, search, told
from recipes.common.recipe_input import InputError

TASKS = {"bytes": ("byte_model", "ByteModel"), "smollm2": ("smollm2", "SmolLM2")}
RESULTS = Path(__file__).with_name("results")
BASELINE = "adamw"
GROWTH = 6


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    names = choose(args.candidates, CANDIDATES)
    module_name, kind = TASKS[args.task]
    module = importlib.import_module(f"benchmarks.lora_rules.{module_name}")
    where = {"rank": args.rank or module.RANK, "steps": args.steps or module.STEPS}
    if min(where.values()) <= 0 or args.seeds < 0:
        raise InputError("--rank and --steps must be above 0, and --seeds at least 0.")
    file = args.results / "{}_rank_{rank}_steps_{steps}.json".format(args.task, **where)
    results = Results(file, {})
    if not args.table:
        torch.set_num_threads(1)
        task = getattr(module, kind)()
        results = Results(file, task.task | where)
        for name in names:
            candidate = CANDIDATES[name]
            search(
                name,
                lambda lr, seed, own=candidate: task.run(
                    own.build, lr, seed, constant=own.constant, report=seed > 0, **where
                ),
                [float(f"{factor * module.LEARNING_RATE:.3g}") for factor in candidate.rates],
                results,
                growth=GROWTH,
                seeds=args.seeds + 1,
                report=lambda run: print(told(run), flush=True),
            )
    print(table(results, names))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/lora_rules", description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--candidates", nargs="+", help=f"default: {', '.join(CANDIDATES)}")
    parser.add_argument("--rank", type=int, help="of A and B (default: the task's own)")
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--seeds", type=int, default=3, help="how many report (default 3)")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder in which the runs are stored")
    return parser


def table(results: Results, names: list[str]) -> str:
    """One line a candidate, the best first.

    Seeds are paired: the same one has the same weights and the same batches. "Below" is how far the validation loss is
    under the baseline's, mean and standard deviation of the pairs; p is that of the paired t-test on the test losses.
    """
    base = reported(results, BASELINE)
    rows = []
    for name in names:
        tried = sorted(results.find(name, seed=0), key=lambda run: run["learning_rate"])
        if tried:
            runs = reported(results, name)
            order = statistics.mean(run["test_loss"] for run in runs) if runs else float("inf")
            grid = ", ".join(f"{run['learning_rate']:g}: {_shown(run['eval_loss'])}" for run in tried)
            test, validation = (_spread([run[key] for run in runs]) for key in ("test_loss", "eval_loss"))
            below, chance = (_below(runs, base), _chance(runs, base)) if name != BASELINE else ("-", "-")
            rows.append((order, [name, test, validation, len(runs), below, chance, f"{results.best(name):g}", grid]))
    columns = ["candidate", "test loss", "validation loss", "seeds", f"below {BASELINE}", f"p against {BASELINE}",
               "rate", "grid (seed 0)"]  # fmt: skip
    return markdown_table(columns, [row for _, row in sorted(rows, key=lambda row: row[0])])


def reported(results: Results, name: str) -> list[dict[str, Any]]:
    """The runs of a candidate at its best rate, with the seeds that chose nothing, that did not diverge."""
    if not results.find(name, seed=0):
        return []
    runs = results.find(name, results.best(name))
    return [run for run in runs if run["seed"] and run["eval_loss"] is not None]


def _spread(losses: list[float]) -> str:
    if not losses:
        return "-"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.4f}{spread}"


def _below(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    pairs = _pairs(runs, base, "eval_loss")
    counted = f" in {sum(own < other for own, other in pairs)} of {len(pairs)} seeds" if pairs else ""
    return _spread([other - own for own, other in pairs]) + counted


def _chance(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    pairs = _pairs(runs, base, "test_loss")
    return f"{ttest_rel(*zip(*pairs, strict=True)).pvalue:.1g}" if len(pairs) > 1 else "-"


def _pairs(runs: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """A loss of a candidate and of the baseline, for each seed that both have."""
    own, others = ({run["seed"]: run[key] for run in some} for some in (runs, base))
    return [(own[seed], others[seed]) for seed in sorted(own.keys() & others.keys())]


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"benchmarks/lora_rules: {problem}")
