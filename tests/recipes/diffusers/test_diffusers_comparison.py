"""The diffusers recipe compares: all optimizers on one task, finished runs in pictures and figures."""

import json
from dataclasses import replace

import pytest
import torch
from scripts import benchmark, compare, image_scores, train

from hf_sai.publishing.cards import write_card
from recipes.common.recipe_input import InputError


@pytest.fixture
def flags(tiny):
    """The tiny checkpoint on the first flags, as `benchmark.py` takes it."""
    return [
        *("--pretrained_model_name_or_path", str(tiny), "--emoji_categories", "flag", "--max_train_samples", "24"),
        *("--resolution", "16", "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"),
        *("--num_inference_steps", "1", "--disable_tqdm", "true"),
    ]


@pytest.fixture
def one_rate_each(monkeypatch):
    """Every candidate with the first learning rate of its grid only."""
    for name, candidate in benchmark.CANDIDATES.items():
        monkeypatch.setitem(benchmark.CANDIDATES, name, replace(candidate, grid=candidate.grid[:1]))
    return ["--growth", "0", "--seeds", "1"]


def adapter_sizes(argv):
    """The number of elements of each tensor of the adapter that these options give."""
    args = train.parse_arguments(argv)
    parts = train.load_parts(args)
    train.add_lora(parts, args)
    return [parameter.numel() for parameter in parts.unet.parameters() if parameter.requires_grad]


def test_benchmark_trains_every_candidate_and_counts_its_state(flags, one_rate_each, tmp_path, capsys):
    benchmark.main([*flags, *one_rate_each, "--results", str(tmp_path / "results.json")])
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    bytes_of = {run["candidate"]: run["state_bytes"] for run in runs}
    assert bytes_of.keys() == benchmark.CANDIDATES.keys()
    sizes = adapter_sizes(flags)
    assert bytes_of["sgd_sai"] == sum(4 * size + 8 for size in sizes)  # the momentum in float32, g-SNR a Python float
    assert bytes_of["adamw"] == sum(8 * size + 4 for size in sizes)  # two moments, and the step
    assert bytes_of["prodigy"] > 1.5 * bytes_of["adamw"]
    assert len({run["train_loss"][0] for run in runs}) == 1  # the same adapter, images and noise for all
    assert "| optimizer | eval loss |" in capsys.readouterr().out


def test_benchmark_agrees_with_the_training_script(flags, one_rate_each, tmp_path):
    benchmark.main([*flags, *one_rate_each, "--results", str(tmp_path / "results.json"), "--candidates", "sgd_sai"])
    run = json.loads((tmp_path / "results.json").read_text())["runs"][0]
    lr = str(run["learning_rate"])
    results = train.main([*flags, "--optim", "sgd_sai", "--learning_rate", lr, "--output_dir", str(tmp_path / "run")])
    assert results["after"]["eval_loss"] == pytest.approx(run["eval_loss"], rel=1e-6)


def test_comparison_has_scores_costs_and_pictures_of_both_runs(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_scores, "STEPS", 2)
    monkeypatch.setattr(compare, "finish_run", lambda folder, twins: [write_card(folder, twins=twins)])
    folders = [str(tmp_path / name) for name in ("ours", "theirs")]
    for folder, optimizer in zip(folders, ("sgd_sai", "adamw_torch"), strict=True):
        train.main([*flags, "--optim", optimizer, "--save_steps", "2", "--output_dir", folder])
    compared = compare.main([*folders, "--output_dir", str(tmp_path / "both"), "--rounds", "3"])
    assert list(compared["scores"]) == ["before", "ours", "theirs", "real, held out"]
    assert compared["scores"]["real, held out"]["eval_loss"] is None
    sizes = adapter_sizes(flags)
    ratio = sum(4 * size + 8 for size in sizes) / sum(8 * size + 4 for size in sizes)
    assert compared["costs"][folders[0]]["optimizer_state_ratio"] == pytest.approx(ratio, rel=1e-12)
    for name in ("comparison.json", "comparison.md", "loss.png", "grid.png"):
        assert (tmp_path / "both" / name).stat().st_size > 0
    assert "theirs" in (tmp_path / "ours" / "README.md").read_text()
    assert "step-time ratio" in capsys.readouterr().out


def test_scores_know_the_same_pictures_from_others():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert image_scores.nearest_distance(red, torch.cat([-red, red])) == pytest.approx(0, abs=1e-5)
    assert image_scores.nearest_distance(red, -red) == pytest.approx(2.0)
    assert image_scores.color_difference(red, red) == 0
    assert image_scores.color_difference(red, -red) == 1
    half = torch.cat([red[:1], -red[:1]])
    assert image_scores.color_difference(half, red) == pytest.approx(0.5)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(InputError, match="is no finished run"):
        compare.main([str(tmp_path)])
    for settings, checkpoint, message in (
        ({"train": "lora"}, None, "has no saved optimizer state; train with --save_steps"),
        ({"train": "full"}, "checkpoint-1", "is no LoRA"),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"settings": settings, "checkpoint": checkpoint}))
        with pytest.raises(InputError, match=message):
            compare.main([str(tmp_path)])
