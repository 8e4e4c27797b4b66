"""The card of a diffusers run: its code draws a picture, for a pipeline and for a LoRA, and it keeps a user's words."""

import re

import pytest
from PIL import Image
from scripts import train

from hf_sai.cards import CARD_FILE, write_card


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
