"""How much do learning rate and weight decay matter? The paper's grid (arXiv 2412.11768) on one task, with heat maps.

    python recipes/vit_classification/robustness.py recipes/vit_classification/benchmark.yaml \\
        --results recipes/vit_classification/results/robustness.json

Every optimizer is trained with each of the learning rates 0.1, 0.01, 0.001, 0.0001 and each of the weight decays 0.01,
0.001, 0.0001. A table gives the best, the mean and the spread of the accuracy over this grid; heat maps are
drawn beside the results file. Every run is written there at once, and a run that stands there is not
repeated. `--optimizers name name` runs only these, `--table true` only prints the table and draws the heat maps.
"""

import itertools
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

from tqdm.auto import tqdm
from train import ScriptArguments, check_arguments
from transformers import TrainingArguments
from vit_task import OPTIMIZERS, Task, task_settings

from hf_sai.publishing.plots import GRID, TEXT, draw, new_figure
from hf_sai.runs.files import atomic_write
from recipes.common.candidates import choose
from recipes.common.comparison import markdown_table
from recipes.common.lr_search import Results
from recipes.common.recipe_input import InputError, parse_config_and_flags

LEARNING_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
WEIGHT_DECAYS = (1e-2, 1e-3, 1e-4)


@dataclass
class GridArguments:
    """What to compare, and where the results go; the task comes from train.py's options."""

    results: str = field(metadata={"help": "JSON file of finished runs; it grows."})
    optimizers: list[str] | None = field(default=None, metadata={"help": f"Default: {', '.join(OPTIMIZERS)}."})
    seeds: int = field(default=1, metadata={"help": "Seeds of each point of the grid."})
    table: bool = field(default=False, metadata={"help": "Run nothing: print the table and draw the heat maps."})


def main(argv: list[str] | None = None) -> None:
    options, args, training_args = parse_config_and_flags(
        (GridArguments, ScriptArguments, TrainingArguments),
        sys.argv[1:] if argv is None else argv,
        usage="robustness.py CONFIG.yaml --results FILE.json [--key value ...]",
    )
    check_arguments(args)
    names = choose(options.optimizers, OPTIMIZERS)
    results = Results(options.results, task_settings(args, training_args))
    if not options.table:
        run_grid(Task(args, training_args), names, results, options.seeds)
    complete = [name for name in names if all(accuracy(results, name, *point) is not None for point in grid())]
    if not complete:
        raise InputError(f"{options.results} has no optimizer with a complete grid; leave out --table.")
    print(table(results, complete))
    picture = Path(options.results).with_suffix(".png")
    print(f"heat maps: {atomic_write(picture, draw(heat_maps(results, complete)))}")


def grid() -> list[tuple[float, float]]:
    """Return every learning rate with every weight decay."""
    return list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))


def run_grid(task: Task, names: list[str], results: Results, seeds: int) -> None:
    """Train at every point of the grid that the results do not have yet, seed by seed."""
    points = list(itertools.product(range(seeds), names, grid()))
    for seed, name, (lr, decay) in tqdm(points, desc="grid", unit="run"):
        candidate = point_name(name, decay)
        if not results.find(candidate, lr, seed):
            run = task.train_once(name, lr, decay, seed)
            results.add({"candidate": candidate, "learning_rate": lr, "seed": seed, **run})
            tqdm.write(f"{candidate}, learning rate {lr:g}, seed {seed}: accuracy {100 * run['eval_accuracy']:.2f} %")


def point_name(name: str, decay: float) -> str:
    """Return the name under which the results keep an optimizer with a weight decay."""
    return f"{name}, weight decay {decay:g}"


def accuracy(results: Results, name: str, lr: float, decay: float) -> float | None:
    """Return the mean accuracy at a point of the grid over its seeds, in percent; None where no run is finished."""
    runs = results.find(point_name(name, decay), lr)
    return 100 * statistics.mean(run["eval_accuracy"] for run in runs) if runs else None


def table(results: Results, names: list[str]) -> str:
    """One line an optimizer: accuracy over the grid."""
    rows = []
    for name in names:
        found = {point: accuracy(results, name, *point) for point in grid()}
        best = max(found, key=found.get)
        values = list(found.values())
        seeds = len(results.find(point_name(name, best[1]), best[0]))
        where = f"{max(values):.2f} (lr {best[0]:g}, wd {best[1]:g})"
        spread = f"{statistics.pstdev(values):.2f}"
        rows.append([name, where, f"{statistics.mean(values):.2f}", spread, f"{min(values):.2f}", seeds])
    return markdown_table(["optimizer", "best accuracy (%)", "mean over the grid", "std", "worst", "seeds"], rows)


def heat_maps(results: Results, names: list[str]):
    """Draw the accuracy over the grid, one map an optimizer."""
    figure = new_figure(width=1.2 + 3.1 * len(names), height=3.6)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        values = [[accuracy(results, name, lr, decay) for decay in WEIGHT_DECAYS] for lr in LEARNING_RATES]
        colors = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (y, line), x in itertools.product(enumerate(values), range(len(WEIGHT_DECAYS))):
            # cividis goes from dark blue to bright yellow: its middle is where black becomes readable.
            ink = "black" if line[x] > 55 else "white"
            axes.text(x, y, f"{line[x]:.1f}", ha="center", va="center", color=ink, fontsize=11)
        flat = list(itertools.chain(*values))
        title = f"{name}\nmean {statistics.mean(flat):.1f}, std {statistics.pstdev(flat):.1f}"
        axes.set_title(title, color=TEXT, fontsize=11)
        axes.set_xticks(range(len(WEIGHT_DECAYS)), [f"{decay:g}" for decay in WEIGHT_DECAYS])
        axes.set_yticks(range(len(LEARNING_RATES)), [f"{lr:g}" for lr in LEARNING_RATES])
        axes.set_xlabel("weight decay", color=TEXT)
        axes.tick_params(colors=TEXT, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    panels[0].set_ylabel("learning rate", color=TEXT)
    bar = figure.colorbar(colors, ax=panels, pad=0.01)
    bar.set_label("accuracy (%)", color=TEXT)
    bar.ax.tick_params(colors=TEXT)
    bar.outline.set_edgecolor(GRID)
    return figure


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"robustness.py: {problem}")
