"""The card of a diffusers run, whose code draws a picture, and a run on the Hub, from its first checkpoint on."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub_server import TOKEN
from PIL import Image
from scripts import train
from test_publish import download, hub  # noqa: F401

from hf_sai.publishing.cards import CARD_FILE, write_card


@pytest.mark.parametrize("what", ["lora", "full"])
def test_the_code_in_the_card_draws(arguments, tiny, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny)
    named = ["--pretrained_model_name_or_path", "base", "--output_dir", "run", "--validation_prompts", "animal: 'cat'"]
    train.main([*arguments, *named, "--train", what])
    card = (tmp_path / "run" / CARD_FILE).read_text()
    assert "![Validation images](images/grid.png)" in card
    assert (tmp_path / "run" / "images" / "grid.png").is_file()
    assert "library_name: diffusers" in card
    assert "pipeline_tag: text-to-image" in card
    exec(re.search(r"```python\n(.*?)\n```", card, re.DOTALL).group(1), {})
    assert Image.open("image.png").size == (16, 16)

    (tmp_path / "run" / CARD_FILE).write_text(card + "\nMy own words.\n")
    assert write_card(tmp_path / "run").read_text() == card + "\nMy own words.\n"


@pytest.mark.parametrize(("what", "strategy"), [("full", "every_save"), ("lora", "checkpoint")])
def test_a_run_is_published_as_hub_strategy_says_and_loads(arguments, tiny, tmp_path, hub, what, strategy):  # noqa: F811
    publishing = ["--push_to_hub", "true", "--hub_model_id", "tester/drawn", "--hub_token", TOKEN]
    publishing += ["--hub_private_repo", "true", "--hub_revision", "v1", "--hub_strategy", strategy]
    train.main([*arguments, "--train", what, "--save_steps", "2", *publishing])
    files = hub.files("tester/drawn", "v1")
    resume = ["last-checkpoint/training_state.pt"] if strategy == "checkpoint" else []
    assert [name for name in files if name.endswith(".pt")] == resume
    assert hub.commits[0][2] == "Training in progress, step 2"
    assert hub.commits[-1][2] == "End of training"
    assert not any(TOKEN.encode() in content for content in files.values())
    assert hub.repos["tester/drawn"]["private"] is True

    copy, run = download(hub, "tester/drawn", tmp_path / "copy", revision="v1"), tmp_path / "run"
    drawn = []
    for folder in (run, copy):
        pipeline = StableDiffusionPipeline.from_pretrained(folder if what == "full" else tiny)
        if what == "lora":
            pipeline.load_lora_weights(folder)
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        drawn.append(pipeline("animal: cat", num_inference_steps=2, generator=seed, output_type="pt").images)
    assert torch.equal(*drawn)
