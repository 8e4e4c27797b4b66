"""The ViT recipe: its commands run, runs resume to the bit, pipelines load what it saves, bad input is refused."""

import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Image
from PIL import Image as Picture
from sklearn.metrics import accuracy_score
from transformers import TrainingArguments, pipeline

from recipes.common.lr_search import Results
from recipes.common.recipe_input import InputError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "vit_classification"
OPTIMIZER_LINES = {"optim", "optim_args", "learning_rate", "weight_decay", "output_dir"}
TWINS = ["demo", "vit_s16_imagenet"]


def load_script(name):
    """Import a file of the recipe under a name that no other recipe uses."""
    spec = importlib.util.spec_from_file_location(f"vit_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(RECIPE))  # where the scripts find the files beside them, as when they are run
train = load_script("train")
with pytest.MonkeyPatch.context() as patch:  # other recipes have a train.py, too
    patch.setitem(sys.modules, "train", train)
    benchmark, robustness = load_script("benchmark"), load_script("robustness")
import labelled_images  # noqa: E402
import picture_views  # noqa: E402
import vit_task  # noqa: E402

sys.path.remove(str(RECIPE))


def columns(**changes):
    defaults = {"dataset_name": None, "dataset_config_name": None, "image_column": "image", "label_column": "label"}
    return SimpleNamespace(**{**defaults, "validation_fraction": 0.2, **changes})


def picture(shade, size=(8, 8)):
    return Picture.new("RGB", size, (shade, shade, shade))


@pytest.fixture
def arguments(tmp_path):
    """The smoke configuration, without progress bars."""
    quiet = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu", "true"]
    return [str(RECIPE / "smoke.yaml"), *quiet, "--output_dir", str(tmp_path / "run")]


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """The documented command, in a process of its own."""
    run = tmp_path_factory.mktemp("smoke") / "run"
    config = ROOT / "recipes" / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(RECIPE / "train.py"), str(RECIPE / "smoke.yaml"), "--output_dir", str(run)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return run, finished.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two sizes in one folder a class."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        for name, shade in (("bright", 200), ("dark", 30)):
            path = root / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(shade + number, (10 + number % 2, 12)).save(path)
    return root


def test_smoke_command_learns_and_says_where_everything_is(smoke_run):
    run, output = smoke_run
    results = json.loads((run / "results.json").read_text())
    assert results["metrics"]["eval_loss"] < math.log(10) - 0.05
    assert results["metrics"]["eval_accuracy"] > 0.15
    assert results["optimizer"]["optim"] == "sgd_sai"
    for name in ("pictures/loss.png", "images/predictions.png", "results.json", "README.md"):
        assert str(run / name) in output
        assert (run / name).stat().st_size > 0
    card = (run / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "images/predictions.png" in card
    assert list(run.glob("runs/*/events.out.tfevents.*")), "TensorBoard's files"


def test_pipeline_loads_the_saved_model_and_answers_as_the_evaluation_did(smoke_run):
    run, _ = smoke_run
    classify = pipeline("image-classification", str(run), device="cpu")
    rows = labelled_images.load_splits(columns())["validation"]
    answers = classify([row["image"].convert("RGB") for row in rows], top_k=1, batch_size=64)
    right = [int(answer[0]["label"]) == row["label"] for answer, row in zip(answers, rows, strict=True)]
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    assert sum(right) / len(right) == pytest.approx(metrics["eval_accuracy"])


def test_resumed_run_ends_with_the_very_loss_of_the_uninterrupted_one(arguments, tmp_path):
    whole = train.main(arguments)
    resumed = [*arguments[:-1], str(tmp_path / "resumed"), "--resume_from_checkpoint"]
    again = train.main([*resumed, str(tmp_path / "run" / "checkpoint-10")])
    assert again["eval_loss"] == whole["eval_loss"]
    assert json.loads((tmp_path / "resumed" / "results.json").read_text())["checkpoint"] == "checkpoint-20"


def test_folder_of_pictures_continues_a_trained_model_with_a_head_of_its_own(smoke_run, folder, arguments, tmp_path):
    options = ["--dataset_name", str(folder), "--model_name_or_path", str(smoke_run[0]), "--max_steps", "2"]
    metrics = train.main([*arguments, *options, "--eval_strategy", "no", "--save_strategy", "no"])
    assert math.isfinite(metrics["eval_loss"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["label2id"] == {"bright": 0, "dark": 1}


def test_digits_are_held_out_class_by_class_and_the_same_every_time():
    splits, again = labelled_images.load_splits(columns()), labelled_images.load_splits(columns())
    assert len(splits["train"]) + len(splits["validation"]) == 1797
    assert len(splits["validation"]) == 359
    assert splits["validation"]["label"] == again["validation"]["label"]
    held_out, trained = (Counter(splits[split]["label"]) for split in ("validation", "train"))
    assert all(abs(held_out[digit] - 0.2 * (held_out[digit] + trained[digit])) < 1 for digit in range(10))
    pixels = numpy.array(splits["train"][0]["image"])
    assert pixels.shape == (8, 8)
    assert pixels.max() > 200


@pytest.mark.parametrize(("labels", "names"), [(["b", "a", "b"], ["a", "b"]), ([10, 9, 10], ["9", "10"])])
def test_texts_and_numbers_become_classes_in_their_order(labels, names):
    rows = Dataset.from_dict({"image": [picture(1)] * 3, "label": labels}).cast_column("image", Image())
    splits = labelled_images._with_classes(DatasetDict(train=rows), "it", "label")
    assert splits["train"].features["label"] == ClassLabel(names=names)
    assert [names[label] for label in splits["train"]["label"]] == list(map(str, labels))


def test_views_in_training_are_random_and_repeat_with_the_seed_and_whole_in_evaluation():
    gradient = Picture.fromarray(numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)).convert("RGB")
    rows = Dataset.from_dict({"image": [gradient], "label": [0]}).cast_column("image", Image())
    args = columns(crop_scale=0.3, flip=True)
    _, processor = train.load_model(train.ScriptArguments(image_size=8), ["a"])
    collate = picture_views.Collator(processor)
    views = picture_views.PictureViews(rows, args, side=8)
    torch.manual_seed(0)
    first, second = collate([views[0], views[0]])["pixel_values"]
    torch.manual_seed(0)
    assert torch.equal(collate([views[0]])["pixel_values"][0], first)
    assert not torch.equal(first, second)
    whole = collate([picture_views.PictureViews(rows, args, side=None)[0]])["pixel_values"][0]
    assert whole.shape == first.shape == (3, 8, 8)
    expected = numpy.array(gradient.resize((8, 8), Picture.Resampling.BILINEAR), dtype=numpy.float32) / 127.5 - 1
    assert torch.allclose(whole, torch.from_numpy(expected).permute(2, 0, 1), atol=1e-5)


def test_crops_cover_the_asked_part_and_half_of_them_are_mirrored():
    torch.manual_seed(0)
    left_to_right = Picture.fromarray(numpy.tile(numpy.arange(0, 200, 2, dtype=numpy.uint8), (100, 1)))
    views = [numpy.array(picture_views.random_view(left_to_right, 50, 0.25, True), dtype=float) for _ in range(300)]
    widths = [abs(view[0, -1] - view[0, 0]) / 200 for view in views]
    assert 0.4 < min(widths) < 0.5  # the root of a quarter, in the narrowest shape
    assert max(widths) > 0.9
    whole = picture_views.random_view(left_to_right, 50, 1.0, False)
    assert numpy.array_equal(whole, left_to_right.resize((50, 50), Picture.Resampling.BICUBIC))
    assert 0.4 < sum(view[0, 0] > view[0, -1] for view in views) / 300 < 0.6


def test_accuracy_is_scikit_learn_s():
    guesses, truth = [1, 2, 0, 2, 1], [1, 2, 2, 2, 0]
    result = evaluate.load(str(train.METRIC)).compute(predictions=guesses, references=truth)
    assert result == {"accuracy": pytest.approx(accuracy_score(truth, guesses))}


@pytest.mark.parametrize(
    ("size", "patch", "parameters"), [("vit-ti", 16, 5_717_416), ("vit-s", 16, 22_050_664), ("vit-b", 32, 88_224_232)]
)
def test_model_sizes_are_the_usual_ones(size, patch, parameters):
    args = train.ScriptArguments(model_size=size, image_size=224, patch_size=patch)
    with torch.device("meta"):
        model, _ = train.load_model(args, [str(label) for label in range(1000)])
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("config", sorted(RECIPE.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_opens_with_command_and_cost_and_has_no_unknown_key(config):
    head = config.read_text().split("\noutput_dir:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"recipes/vit_classification/{config.name}" in head
    assert "# Cost: " in head
    allowed = set(train.ScriptArguments.__dataclass_fields__) | set(TrainingArguments.__dataclass_fields__)
    assert set(yaml.safe_load(config.read_text())) <= allowed


@pytest.mark.parametrize("name", TWINS)
def test_adamw_twin_differs_only_in_the_optimizer_s_lines(name):
    ours, adamw = (yaml.safe_load((RECIPE / f"{name}{twin}.yaml").read_text()) for twin in ("", "_adamw"))
    differing = {key for key in ours | adamw if ours.get(key) != adamw.get(key)}
    assert differing <= OPTIMIZER_LINES
    ours_expected = "sgd_sai_orthogonal" if name == "demo" else "sgd_sai"
    assert (ours["optim"], adamw["optim"]) == (ours_expected, "adamw_torch_fused")


BAD_INPUT = {
    "missing configuration": (["nowhere.yaml"], "cannot read the settings: .*nowhere.yaml"),
    "unknown key": (["--lerning_rate", "1"], "cannot read the settings: .*lerning_rate"),
    "unknown optimizer option": (["--optim_args", "mass=1"], "cannot build the optimizer sgd_sai: .*mass"),
    "unreachable data": (["--dataset_name", "some/pictures"], "cannot load some/pictures: "),
    "unknown image column": (["--dataset_name", "FOLDER", "--image_column", "photo"], "has no column 'photo'"),
    "labels for images": (["--dataset_name", "FOLDER", "--image_column", "label"], "'label' of .* holds no images"),
    "images for labels": (
        ["--dataset_name", "FOLDER", "--label_column", "image"],
        "must hold classes, texts or whole numbers",
    ),
    "unknown size": (["--model_size", "huge"], "model_size is 'huge'; choose one of tiny, vit-ti"),
    "patches that do not fit": (["--patch_size", "3"], "must be a multiple of the second"),
    "crop of nothing": (["--crop_scale", "0"], "crop_scale is 0.0; it must be above 0"),
    "nothing held out": (["--validation_fraction", "0"], "validation_fraction is 0.0; it must be between"),
    "too few held out": (["--validation_fraction", "0.001"], "cannot hold out 2 of the 1797 pictures .* 10 classes"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
    "missing model": (["--model_name_or_path", "./nowhere"], "cannot load the model ./nowhere"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_no_output_directory(options, message, arguments, folder, tmp_path):
    options = [str(folder) if option == "FOLDER" else option for option in options]
    argv = [*options, *arguments[1:]] if options[0].endswith(".yaml") else [*arguments, *options]
    with pytest.raises(InputError, match=message) as caught:
        train.main(argv)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_labels_that_are_missing_or_never_trained_are_refused():
    classes = ClassLabel(names=["a", "b"])
    known = Dataset.from_dict({"label": [0, 1]}).cast_column("label", classes)
    unlabelled = Dataset.from_dict({"label": [-1, -1]}).cast_column("label", classes)
    with pytest.raises(InputError, match=r"rows without a label .* in its split test"):
        labelled_images._with_classes(DatasetDict(train=known, test=unlabelled), "it", "label")
    gap = DatasetDict(train=Dataset.from_dict({"label": ["a", None]}))
    with pytest.raises(InputError, match=r"rows without a label .* in its split train"):
        labelled_images._with_classes(gap, "it", "label")
    texts = DatasetDict(train=Dataset.from_dict({"label": ["a"]}), validation=Dataset.from_dict({"label": ["c"]}))
    with pytest.raises(InputError, match="it is validated on a class that it does not train"):
        labelled_images._with_classes(texts, "it", "label")


def test_picture_that_cannot_be_read_is_named(tmp_path, arguments):
    for number in range(10):
        path = tmp_path / "broken" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot read .*\d\.png: .*; repair it or take it out"):
        train.main([*arguments, "--dataset_name", str(tmp_path / "broken")])
    assert not (tmp_path / "run").exists()


def test_all_compared_optimizers_decay_the_same_parameters():
    model, _ = train.load_model(train.ScriptArguments(), ["a", "b"])
    decaying = []
    for build in vit_task.OPTIMIZERS.values():
        groups = build(model, 0.1, 0.25).param_groups
        assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
        assert {group["lr"] for group in groups} == {0.1}
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        decaying.append({id(p) for group in groups if group["weight_decay"] for p in group["params"]})
    assert decaying[0] == decaying[1] == decaying[2]


class FakeTask:
    """Accuracy falls with the distance to a learning rate of 0.01; 0.1 diverges."""

    calls: list = []  # noqa: RUF012

    def __init__(self, *_):
        pass

    def train_once(self, name, lr, decay, seed):
        self.calls.append((name, lr, decay, seed))
        distance = abs(math.log10(lr) + 2)
        return {
            "weight_decay": decay,
            "eval_loss": math.nan if lr == 0.1 else distance + seed / 10,
            "eval_accuracy": 0.1 if lr == 0.1 else 0.9 - distance / 10 - seed / 100,
            "state_bytes": 8,
            "train_seconds": 0.0,
        }


def test_grid_tabulates_mean_and_spread_draws_maps_and_repeats_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(robustness, "Task", FakeTask)
    monkeypatch.setattr(FakeTask, "calls", [])
    argv = [str(RECIPE / "benchmark.yaml"), "--results", str(tmp_path / "grid.json"), "--optimizers", "adamw"]
    robustness.main(argv)
    robustness.main([*argv, "--seeds", "2"])
    assert len(FakeTask.calls) == len(set(FakeTask.calls)) == 24
    # Per learning rate: (0.1 + 0.1) / 2, (0.9 + 0.89) / 2, (0.8 + 0.79) / 2, (0.7 + 0.69) / 2.
    assert "| adamw | 89.50 (lr 0.01, wd 0.01) | 62.12 | 30.91 | 10.00 | 2 |" in capsys.readouterr().out
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_takes_each_optimizer_s_own_best_rate_with_all_seeds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "Task", FakeTask)
    monkeypatch.setattr(benchmark, "GRIDS", {"adamw": (1e-3, 1e-2, 1e-1)})
    benchmark.main([str(RECIPE / "benchmark.yaml"), "--results", str(tmp_path / "runs.json"), "--optimizers", "adamw"])
    row = "| adamw | 0.01 | 89.00 ± 1.00 | 0.1000 ± 0.1000 | 3 | 0.001: 1.0000, 0.01: 0.0000, 0.1: diverged | 8 |"
    assert row in capsys.readouterr().out


def test_comparisons_refuse_unknown_optimizers_runs_of_another_task_and_a_table_of_nothing(tmp_path):
    argv = [str(RECIPE / "benchmark.yaml"), "--results", str(tmp_path / "runs.json")]
    with pytest.raises(InputError, match="no candidate is called adam; choose among adamw"):
        benchmark.main([*argv, "--optimizers", "adam"])
    with pytest.raises(InputError, match="no optimizer with a complete grid"):
        robustness.main([*argv, "--table", "true"])
    Results(tmp_path / "runs.json", {"max_steps": "7"}).add(
        {"candidate": "adamw", "learning_rate": 1, "seed": 0, "eval_loss": 1.0}
    )
    with pytest.raises(InputError, match=r"holds runs with another .*max_steps"):
        benchmark.main([*argv, "--table", "true"])


def test_a_real_run_of_the_comparison_reports_what_was_measured():
    args, training_args = train.parse_arguments([str(RECIPE / "benchmark.yaml"), "--max_steps", "2"])
    task = vit_task.Task(args, training_args)
    ours, adamw = (task.train_once(name, 1e-3, 0.01, 0) for name in ("sgd_sai", "adamw"))
    assert 0 <= ours["eval_accuracy"] <= 1
    assert adamw["state_bytes"] / ours["state_bytes"] == pytest.approx(2, abs=0.02)
