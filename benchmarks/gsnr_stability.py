"""How stable g-SNR is over training and over batches, in any Trainer script: what the paper's Figure 4 shows.

    task="recipes/gpt2_pretraining/train.py recipes/gpt2_pretraining/demo.yaml --optim sgd_sai"
    python benchmarks/gsnr_stability.py --steps 400 --output runs/gsnr/training.json $task --learning_rate 1e-2
    python benchmarks/gsnr_stability.py --steps 50 --output runs/gsnr/batches.json $task --learning_rate 0
    python benchmarks/gsnr_stability.py --picture docs/gsnr_stability runs/gsnr/training.json runs/gsnr/batches.json

The g-SNR of every tensor is measured again before each step, with the gradients that the optimizer gets; with a
learning rate of 0 nothing but the batch changes. Printed and drawn is g-SNR over its first value: for matrices and for
vectors (biases, norms) the median over all tensors, the middle nine tenths, and the extremes.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes.common lies in the repository's root

from torch.optim.optimizer import register_optimizer_step_pre_hook
from watched_run import watch_steps

from hf_sai import SGDSaI
from hf_sai.optim.gsnr import measure_gsnr
from hf_sai.publishing.plots import COLORS, TEXT, draw, dress, new_figure
from hf_sai.runs.files import atomic_write
from recipes.common.comparison import markdown_table

KINDS = ("matrices", "vectors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="how many steps to watch (default: 100)")
    parser.add_argument("--output", type=Path, help="JSON file of what was measured")
    parser.add_argument("--picture", type=Path, help="measure nothing: draw these files; path without suffix")
    parser.add_argument("target", help="path of a script that trains with SGD-SaI, or the first file to draw")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own, or more files")
    args = parser.parse_args()
    if args.picture is None and args.output is None:
        parser.error("say where the result goes: --output FILE.json")
    if args.picture is None:
        watch(args.target, args.arguments, args.steps, args.output)
        return
    measured = {Path(path).stem: json.loads(Path(path).read_text()) for path in [args.target, *args.arguments]}
    atomic_write(args.picture.with_suffix(".png"), draw(picture(measured)))
    print(table(measured))


def watch(script: str, arguments: list[str], steps: int, output: Path) -> None:
    """Run the script for some steps and write, for each tensor, its kind and its g-SNR before each of them."""
    tensors: dict[str, dict] = {}

    def measure(optimizer: SGDSaI) -> None:
        named = [
            (name, p)
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if p.grad is not None
        ]
        for (name, p), gsnr in zip(named, measure_gsnr([p.grad for _, p in named]), strict=True):
            kind = KINDS[0] if p.ndim > 1 else KINDS[1]
            tensors.setdefault(name, {"kind": kind, "elements": p.numel(), "gsnr": []})["gsnr"].append(gsnr)

    watch_steps(script, arguments, steps, register_optimizer_step_pre_hook, measure)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, json.dumps(tensors) + "\n")


def over_first(tensors: dict[str, dict], kind: str) -> list[list[float]]:
    """Of each tensor of a kind the g-SNR over its first value; a tensor that was not always measured is left out."""
    curves = [tensor["gsnr"] for tensor in tensors.values() if tensor["kind"] == kind and all(tensor["gsnr"])]
    return [[value / curve[0] for value in curve] for curve in curves]


def table(measured: dict[str, dict]) -> str:
    rows = []
    for name, tensors in measured.items():
        for kind in KINDS:
            values = sorted(value for curve in over_first(tensors, kind) for value in curve)
            middle = f"{values[len(values) // 20]:.3f} to {values[-1 - len(values) // 20]:.3f}"
            rows.append(
                [name, kind, f"{statistics.median(values):.4f}", middle, f"{values[0]:.3f} to {values[-1]:.3f}"]
            )
    return markdown_table(["", "tensors", "median", "middle nine tenths", "extremes"], rows)


def picture(measured: dict[str, dict]):
    figure = new_figure(width=5 * len(measured), height=6.4)
    panels = figure.subplots(len(KINDS), len(measured), squeeze=False, sharey="row")
    for column, (name, tensors) in enumerate(measured.items()):
        for row, kind in enumerate(KINDS):
            axes, color = panels[row][column], COLORS[row]
            at_step = [sorted(values) for values in zip(*over_first(tensors, kind), strict=True)]
            steps = range(1, len(at_step) + 1)
            for share, alpha in ((0.0, 0.15), (0.05, 0.35)):
                low = [values[int(share * len(values))] for values in at_step]
                high = [values[-1 - int(share * len(values))] for values in at_step]
                axes.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0)
            axes.plot(steps, [statistics.median(values) for values in at_step], color=color)
            dress(axes, "step" if row else "", f"g-SNR / first, {kind}" if column == 0 else "")
            if row == 0:
                axes.set_title(name, color=TEXT)
    return figure


if __name__ == "__main__":
    main()
