"""Train over a grid of settings and seeds, and tabulate the evaluation loss with its spread.

    python recipes/gpt2_pretraining/sweep.py recipes/gpt2_pretraining/demo.yaml --output runs/gpt2_sweep/sgd_sai \\
        --grid learning_rate=3e-3,1e-2,3e-2 --grid seed=0,1,2

Every `--grid KEY=V1,V2,...` is one axis; seeds are averaged over. What sweep.py does not know goes to train.py. After
each run OUTPUT.json and OUTPUT.md are written anew; a run that is in OUTPUT.json is not repeated, so an interrupted
sweep goes on where it was, and a finer grid adds to an older one.
"""

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import train

from hf_sai.runs.files import atomic_write
from recipes.common.comparison import markdown_table
from recipes.common.result_files import read_json, write_json


def main(argv: list[str] | None = None) -> list[dict]:
    args, common = make_parser().parse_known_args(argv)
    path = args.output.with_suffix(".json")
    runs = read_json(path, list) if path.is_file() else []
    points = [dict(zip(args.grid, values, strict=True)) for values in itertools.product(*args.grid.values())]
    for index, point in enumerate(points):
        settings = {"config": args.config, "common": " ".join(common), **point}
        if any(run["settings"] == settings for run in runs):
            continue
        print(f"run {index + 1} of {len(points)}: {point}", flush=True)
        loss = evaluation_loss([args.config, *common, *itertools.chain(*((f"--{k}", v) for k, v in point.items()))])
        runs.append({"settings": settings, "eval_loss": loss})
        write_json(path, runs)
        atomic_write(args.output.with_suffix(".md"), tabulate(runs) + "\n")
    print(tabulate(runs))
    return runs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="sweep.py CONFIG.yaml --output PATH --grid KEY=V1,V2 [--key value ...]")
    parser.add_argument("config", help="configuration of train.py")
    parser.add_argument("--output", type=Path, required=True, help="path of the tables, without suffix")
    parser.add_argument("--grid", action=Axes, required=True, metavar="KEY=V1,V2", help="an axis of the grid")
    return parser


class Axes(argparse.Action):
    """Collects the axes into a dict from key to values."""

    def __call__(self, parser, namespace, text, option_string=None):
        key, _, values = text.partition("=")
        if not key or not all(values.split(",")):
            parser.error(f"--grid {text}: give a key, = and values with commas, for example learning_rate=1e-3,3e-3")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), key: values.split(",")})


def evaluation_loss(argv: list[str]) -> float | None:
    """Train once in a folder that is deleted afterwards; None if the loss is not finite."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--sample_tokens", "0"]
        loss = train.main([*argv, *quiet, "--disable_tqdm", "true", "--output_dir", folder])["eval_loss"]
    return loss if math.isfinite(loss) else None


def tabulate(runs: list[dict]) -> str:
    """One row for each setting, seeds pooled: mean, standard deviation and range of the evaluation loss."""
    pooled: dict[str, list] = {}
    for run in runs:
        common = run["settings"]["common"].removeprefix("--").replace(" --", ", ")
        point = [f"{k} {v}" for k, v in run["settings"].items() if k not in ("config", "common", "seed")]
        name = ", ".join([Path(run["settings"]["config"]).stem, *([common] if common else []), *point])
        pooled.setdefault(name, []).append(run["eval_loss"])
    rows = []
    for name, losses in pooled.items():
        finite = [loss for loss in losses if loss is not None]
        mean = f"{statistics.mean(finite):.4f}" if finite else "-"
        spread = f"{statistics.stdev(finite):.4f}" if len(finite) > 1 else "-"
        extent = f"{min(finite):.4f} to {max(finite):.4f}" if len(finite) > 1 else "-"
        rows.append([name, len(losses), len(losses) - len(finite), mean, spread, extent])
    return markdown_table(["setting", "seeds", "diverged", "eval loss, mean", "std", "range"], rows)


if __name__ == "__main__":
    try:
        main()
    except train.InputError as problem:
        sys.exit(f"sweep.py: {problem}")
