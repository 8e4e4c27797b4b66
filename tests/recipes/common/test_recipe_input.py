"""Which checkpoint a recipe resumes from, and which settings it refuses."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from recipes.common.recipe_input import InputError, check_optimizer, find_checkpoint, parse_config_and_flags


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


def test_a_truncated_state_is_no_whole_checkpoint(tmp_path):
    whole = checkpoint(tmp_path, 9, "trainer_state.json")
    cut = checkpoint(tmp_path, 10, "trainer_state.json")
    Path(cut, "trainer_state.json").write_text('{"global_step": 1')
    assert found(tmp_path) == whole
    with pytest.raises(InputError, match="is no checkpoint folder of this trainer"):
        find_checkpoint(SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=cut))


@pytest.mark.parametrize(
    ("reached", "wanted"), [({"global_step": 9}, {"max_steps": 9}), ({"epoch": 3.0}, {"num_train_epochs": 3})]
)
def test_a_finished_run_is_not_resumed_for_one_step_more(reached, wanted, tmp_path):
    last = checkpoint(tmp_path, 9, "trainer_state.json")
    Path(last, "trainer_state.json").write_text(json.dumps(reached))
    limits = {"max_steps": -1, "num_train_epochs": 9} | wanted
    args = {"output_dir": str(tmp_path), "resume_from_checkpoint": "true"}
    with pytest.raises(InputError, match="nothing is left to train"):
        find_checkpoint(SimpleNamespace(**args, **limits))
    (key,) = wanted
    assert find_checkpoint(SimpleNamespace(**args, **limits | {key: 10})) == last


BAD = {
    "yaml": ("a: [1\n", "is no YAML, line 2"),
    "bytes": ("\x00", "is no YAML"),
    "no settings": ("- 1\n", "holds no settings"),
    "list for a number": ("learning_rate: [1]\n", r"learning_rate is \[1\]; it must be a number"),
    "dict for a text": ("output_dir: {a: 1}\n", "output_dir is {'a': 1}; it must be a text"),
    "text for a number": ("learning_rate: fast\n", "invalid float value: 'fast'"),
    "inf": ("learning_rate: .inf\n", "learning_rate is inf; it must be"),
    "nan": ("weight_decay: .nan\n", "weight_decay is nan; it must be"),
    "huge": ("max_steps: 1" + "0" * 400 + "\n", "max_steps is 1000"),
    "empty folder": ("output_dir: ''\n", "output_dir is empty"),
    "no batch": ("per_device_train_batch_size: 0\n", "per_device_train_batch_size is 0; it must be at least 1"),
    "deepspeed": ("deepspeed: nothing.json\n", "cannot read the settings"),
    "unknown": ("made_up: 1\n", "made_up"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_settings_that_nothing_can_be_done_with_are_one_sentence(text, message, tmp_path):
    pytest.importorskip("trl")
    file = tmp_path / "config.yaml"
    file.write_text(text)
    output = [] if "output_dir" in text else ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=message) as caught:
        parse_config_and_flags([transformers.TrainingArguments], [str(file), *output], usage="x")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(60)
def test_settings_in_a_pipe_are_refused_at_once(tmp_path):
    pytest.importorskip("trl")
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(InputError, match=r"cannot read .*config\.yaml: it is no regular file"):
        parse_config_and_flags([transformers.TrainingArguments], [str(tmp_path / "config.yaml")], usage="x")


@pytest.mark.parametrize("options", ["momentum=2", "made_up=1", "momentum=1" + "0" * 400])
def test_an_optimizer_that_refuses_its_options_is_told_before_anything_is_written(options, tmp_path):
    args = transformers.TrainingArguments(str(tmp_path / "out"), optim="sgd_sai", optim_args=options, report_to=[])
    with pytest.raises(InputError, match="cannot build the optimizer sgd_sai"):
        check_optimizer(args, torch.nn.Linear(2, 2))
    assert not (tmp_path / "out").exists()


def test_no_whole_checkpoint_is_an_error(tmp_path):
    checkpoint(tmp_path, 10, "model.safetensors")
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        found(tmp_path)


def test_another_loop_has_another_marker(tmp_path):
    checkpoint(tmp_path, 2, "trainer_state.json")
    other = checkpoint(tmp_path, 1)
    torch.save({"step": 1}, f"{other}/training_state.pt")
    checkpoint(tmp_path, 3, "training_state.pt")  # not to its end
    assert found(tmp_path, marker="training_state.pt") == other
