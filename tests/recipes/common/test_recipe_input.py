"""Which checkpoint a recipe resumes from."""

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
from recipes.common.recipe_input import InputError, find_checkpoint


def checkpoint(run, step, *files):
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    for file in files:
        (folder / file).write_text("{}")
    return str(folder)


def found(run, **options):
    return find_checkpoint(SimpleNamespace(output_dir=str(run), resume_from_checkpoint="true"), **options)


def test_a_checkpoint_that_a_killed_run_was_writing_is_passed_over(tmp_path):
    whole = checkpoint(tmp_path, 9, "model.safetensors", "trainer_state.json")
    checkpoint(tmp_path, 8, "trainer_state.json")
    checkpoint(tmp_path, 10, "model.safetensors")
    assert found(tmp_path) == whole


def test_no_whole_checkpoint_is_an_error(tmp_path):
    checkpoint(tmp_path, 10, "model.safetensors")
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        found(tmp_path)


def test_another_loop_has_another_marker(tmp_path):
    checkpoint(tmp_path, 2, "trainer_state.json")
    other = checkpoint(tmp_path, 1, "training_state.pt")
    assert found(tmp_path, marker="training_state.pt") == other
