"""Put finished runs of train.py side by side: loss, perplexity, optimizer state, step time.

    python recipes/gpt2_pretraining/compare.py runs/gpt2_demo runs/gpt2_demo_adamw

The last run is the baseline of the ratios. Optimizer state is counted in the run's last checkpoint. Step times are
measured here and now: every run's optimizer is built again with its settings and its saved state on its trained model,
and their steps are timed in turn in this one process, so that a busy machine disturbs all alike.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.plots import draw, plot_loss
from hf_sai.runs.files import atomic_write
from hf_sai.runs.meters import state_bytes
from hf_sai.runs.record import RunRecord
from recipes.common.comparison import (
    interleaved_step_times,
    markdown_table,
    step_time_ratio,
)
from recipes.common.recipe_input import InputError, first_line
from recipes.common.result_files import read_json, write_json

COLUMNS = (
    "run",
    "optimizer",
    "learning rate",
    "eval loss",
    "perplexity",
    "state (bytes)",
    "state ratio",
    "step (ms)",
    "step-time ratio (quartiles)",
)


def main(argv: list[str] | None = None) -> dict:
    args = make_parser().parse_args(argv)
    if len(args.runs) < 2 or len(set(args.runs)) < len(args.runs):
        raise InputError("give at least two different run folders.")
    results = {str(run): read_run(run) for run in args.runs}
    optimizers = {}
    for name, result in results.items():
        try:
            optimizers[name] = load_optimizer(Path(name), result)
        except Exception as error:  # damage shows in the model, the settings or the state, each with errors of its own
            raise InputError(f"{name} is damaged: {first_line(error)}") from error
    state = {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}
    seconds = interleaved_step_times(optimizers, rounds=args.rounds)

    baseline = str(args.runs[-1])
    comparison = {"baseline": baseline, "threads": torch.get_num_threads(), "runs": {}}
    for name, result in results.items():
        comparison["runs"][name] = {
            **result["optimizer"],
            "parameters": result["parameters"],
            "eval_loss": result["metrics"]["eval_loss"],
            "eval_perplexity": result["metrics"]["eval_perplexity"],
            "optimizer_state_bytes": state[name],
            "optimizer_state_ratio": state[name] / state[baseline],
            "step_seconds_median": sorted(seconds[name])[len(seconds[name]) // 2],
            "step_time_ratio": step_time_ratio(seconds[name], seconds[baseline]),
        }
    save(comparison, results, args.output_dir)
    return comparison


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Put finished runs of train.py side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="output_dir of each run; the last one is the baseline")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpt2_comparison"), help="where to save")
    parser.add_argument("--rounds", type=int, default=100, help="timed steps of each optimizer (default 100)")
    return parser


def read_run(run: Path) -> dict:
    if not (run / "results.json").is_file():
        raise InputError(f"{run} is no finished run of train.py: it has no results.json.")
    keys = ("checkpoint", "optimizer.optim", "optimizer.learning_rate", "parameters")
    result = read_json(run / "results.json", keys=(*keys, "metrics.eval_loss", "metrics.eval_perplexity"))
    if result["checkpoint"] is None or not (run / str(result["checkpoint"]) / "optimizer.pt").is_file():
        raise InputError(f"{run} has no saved optimizer state; train with --save_strategy steps.")
    return result


def read_state(run: Path, result: dict) -> dict:
    return torch.load(run / result["checkpoint"] / "optimizer.pt", map_location="cpu", weights_only=True)


def load_optimizer(run: Path, result: dict) -> torch.optim.Optimizer:
    """Build the run's optimizer on its trained model as Trainer did, with its saved state and some gradients."""
    model = AutoModelForCausalLM.from_pretrained(run)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, report_to="none", **result["optimizer"])
        model = model.to(settings.device)
        optimizer = Trainer(model, settings).create_optimizer()
    optimizer.load_state_dict(read_state(run, result))
    set_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)  # neither optimizer's time depends on the values
    return optimizer


def save(comparison: dict, results: dict, folder: Path) -> None:
    """Save comparison.json, comparison.md and loss.png; print the table and where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown_table(COLUMNS, [table_row(name, run) for name, run in comparison["runs"].items()])
    write_json(folder / "comparison.json", comparison)
    atomic_write(folder / "comparison.md", table + "\n")
    picture = folder / "loss.png"
    atomic_write(picture, draw(plot_loss([RunRecord.load(name) for name in results])))
    print(f"\n{table}\n\nRatios are to {comparison['baseline']}.")
    for name in results:
        others = [other for other in results if other != name]
        print(f"checkpoint: {name}\nmodel card: {finish_run(name, twins=others)[-1]}")
    print(f"picture: {picture}\nnumbers: {folder / 'comparison.json'}, {folder / 'comparison.md'}")


def table_row(name: str, run: dict) -> list[str]:
    ratio = run["step_time_ratio"]
    return [
        name,
        run["optim"],
        f"{run['learning_rate']:g}",
        f"{run['eval_loss']:.4f}",
        f"{run['eval_perplexity']:.2f}",
        f"{run['optimizer_state_bytes']:,}",
        f"{run['optimizer_state_ratio']:.3f}",
        f"{1000 * run['step_seconds_median']:.2f}",
        f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})",
    ]


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"compare.py: {problem}")
