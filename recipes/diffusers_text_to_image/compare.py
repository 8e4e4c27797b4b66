"""Put finished LoRA runs of train.py on the emoji side by side: losses, pictures, optimizer state, step time.

    python recipes/diffusers_text_to_image/compare.py runs/diffusers_flags runs/diffusers_flags_adamw

The last run is the baseline of the ratios. Every run, and the base without an adapter, draws the held-out captions of
its category from the same noise. Optimizer state is counted in the run's last checkpoint. Step times are measured here
and now: the optimizers step in turn in this one process, so that a busy machine disturbs all alike.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes.common lies in the repository's root

import torch
from arguments import Arguments
from emoji_data import CATEGORIES, load_emoji
from evaluation import save_grid
from image_data import read_pictures
from image_scores import classify, color_difference, nearest_distance, train_classifier
from optimizers import build_optimizer, read_settings
from sd_parts import Denoiser, add_lora, load_parts, make_pipeline, sample
from tqdm.auto import tqdm

from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.plots import draw, plot_loss
from hf_sai.runs.files import atomic_write
from hf_sai.runs.meters import state_bytes
from hf_sai.runs.record import RunRecord
from recipes.common.comparison import interleaved_step_times, markdown_table, step_time_ratio
from recipes.common.recipe_input import OPTIMIZER_SETTINGS, InputError, first_line
from recipes.common.result_files import read_json, write_json

CATEGORY = "flag"
SHOWN = 8
COLUMNS = ("", "eval loss", "taken for a flag", "distance to nearest", "colour difference")
COSTS = ("run", "optimizer", "learning rate", "state (bytes)", "state ratio", "step-time ratio (quartiles)")


def main(argv: list[str] | None = None) -> dict:
    options = make_parser().parse_args(argv)
    runs = {str(folder): read_run(folder) for folder in options.runs}
    args = runs[str(options.runs[-1])]["args"]
    splits = load_emoji([CATEGORY])
    captions = list(splits["validation"]["text"])
    real = {
        name: torch.cat(list(read_pictures(splits[name], "image", args.resolution))) for name in ("train", "validation")
    }
    classifier, accuracy, flags = train_classifier(load_emoji(), args.resolution)

    parts = load_parts(args)
    pipeline = make_pipeline(parts)
    drawn = {"before": draw_captions(pipeline, captions, args)}
    for name in runs:
        pipeline.load_lora_weights(name)
        drawn[Path(name).name] = draw_captions(pipeline, captions, args)
        pipeline.unload_lora_weights()
    pictures = {name: to_tensor(images) for name, images in drawn.items()} | {"real, held out": real["validation"]}
    category = list(CATEGORIES).index(CATEGORY)
    scores = {
        name: {
            "taken for a flag": (classify(classifier, images) == category).float().mean().item(),
            "distance to nearest": nearest_distance(images, real["train"]),
            "colour difference": color_difference(images, real["train"]),
        }
        for name, images in pictures.items()
    }
    losses = {"before": next(iter(runs.values()))["before"]["eval_loss"]}
    losses |= {Path(name).name: run["after"]["eval_loss"] for name, run in runs.items()}
    comparison = {
        "classifier": {"accuracy, all categories": accuracy, "accuracy, held-out flags": flags},
        "scores": {name: {"eval_loss": losses.get(name), **values} for name, values in scores.items()},
        "costs": measure_costs(runs, options.rounds),
    }
    save(comparison, runs, drawn, captions, options.output_dir)
    return comparison


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Put finished LoRA runs on the emoji side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="output_dir of each run; the last one is the baseline")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/diffusers_comparison"), help="where to save")
    parser.add_argument("--rounds", type=int, default=100, help="timed steps of each optimizer (default 100)")
    return parser


def read_run(folder: Path) -> dict:
    """The run's results, and the settings it was trained with as `args`."""
    if not (folder / "results.json").is_file():
        raise InputError(f"{folder} is no finished run of train.py: it has no results.json.")
    result = read_json(folder / "results.json", keys=("checkpoint", "settings.train"))
    if result["checkpoint"] is None:
        raise InputError(f"{folder} has no saved optimizer state; train with --save_steps.")
    if result["settings"]["train"] != "lora":
        raise InputError(f"{folder} is no LoRA; this script compares LoRA runs.")
    try:
        return {**result, "args": Arguments(**result["settings"])}
    except TypeError as error:
        raise InputError(f"{folder / 'results.json'} is of another version: {first_line(error)}") from error


def draw_captions(pipeline, captions: list[str], args: Arguments) -> list:
    parts = [captions[start : start + 16] for start in range(0, len(captions), 16)]
    return [image for part in tqdm(parts, desc="drawing", unit="batch") for image in sample(pipeline, part, args)]


def to_tensor(images: list) -> torch.Tensor:
    arrays = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    width, height = images[0].size
    return torch.stack(arrays).view(-1, height, width, 3).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def measure_costs(runs: dict, rounds: int) -> dict:
    """Count each run's optimizer state, and time its optimizer's steps, the state loaded, beside the others'."""
    optimizers, state = {}, {}
    for name, run in runs.items():
        file = Path(name, str(run["checkpoint"]), "training_state.pt")
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)["optimizer"]
        except Exception as error:  # a damaged archive or pickle can fail in any way
            raise InputError(f"{file} cannot be read: {first_line(error)}") from error
        settings = read_settings(run["args"])
        parts = load_parts(run["args"])
        add_lora(parts, run["args"])
        model = Denoiser(parts.unet, parts.text_encoder if run["args"].train_text_encoder else None)
        optimizers[name] = build_optimizer(settings, model)
        optimizers[name].load_state_dict(saved)
        state[name] = state_bytes(optimizers[name])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)  # neither optimizer's time depends on the values
    seconds = interleaved_step_times(optimizers, rounds=rounds)
    baseline = list(runs)[-1]
    return {
        name: {
            **{key: run["settings"][key] for key in OPTIMIZER_SETTINGS},
            "optimizer_state_bytes": state[name],
            "optimizer_state_ratio": state[name] / state[baseline],
            "step_time_ratio": step_time_ratio(seconds[name], seconds[baseline]),
        }
        for name, run in runs.items()
    }


def save(comparison: dict, runs: dict, drawn: dict, captions: list[str], folder: Path) -> None:
    """Save comparison.json, comparison.md, the loss and the pictures; print the tables and where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = f"{score_table(comparison)}\n\n{cost_table(comparison)}"
    write_json(folder / "comparison.json", comparison)
    atomic_write(folder / "comparison.md", tables + "\n")
    atomic_write(folder / "loss.png", draw(plot_loss([RunRecord.load(name) for name in runs])))
    save_grid({name: images[:SHOWN] for name, images in drawn.items()}, captions[:SHOWN], folder / "grid.png")
    print(f"\n{tables}\n\nRatios are to {list(runs)[-1]}.")
    for name in runs:
        print(f"model card: {finish_run(name, twins=[other for other in runs if other != name])[-1]}")
    print(f"pictures: {folder / 'grid.png'}, {folder / 'loss.png'}\nnumbers: {folder / 'comparison.json'}")


def score_table(comparison: dict) -> str:
    def shown(values: dict) -> list[str]:
        loss = "" if values["eval_loss"] is None else f"{values['eval_loss']:.4f}"
        return [loss, *(f"{values[key]:.3f}" for key in COLUMNS[2:])]

    return markdown_table(COLUMNS, [[name, *shown(values)] for name, values in comparison["scores"].items()])


def cost_table(comparison: dict) -> str:
    rows = []
    for name, run in comparison["costs"].items():
        ratio = run["step_time_ratio"]
        times = f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"
        state = [f"{run['optimizer_state_bytes']:,}", f"{run['optimizer_state_ratio']:.3f}"]
        rows.append([name, run["optim"], f"{run['learning_rate']:g}", *state, times])
    return markdown_table(COSTS, rows)


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"compare.py: {problem}")
