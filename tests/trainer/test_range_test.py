"""The range test: rates that grow, nothing left behind, a suggestion, clear refusals; the command."""

import importlib.util
import json
import math
import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sai import SGDSaI
from hf_sai.cli import lr_find
from hf_sai.cli.main import main
from hf_sai.trainer.range_plot import plot_range_test
from hf_sai.trainer.range_test import RangeTest, range_test

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

rows = [{"x": x, "labels": x.sum()} for x in torch.randn(64, 4)]
trainer = Trainer(Model(), args, train_dataset=rows)
trainer.train()
Path("trained").touch()
"""


class Rows(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(96, 6, generator=generator)
        self.y = self.x @ torch.arange(6.0) + 0.1 * torch.randn(96, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class Model(nn.Module):
    """Has all that training changes: weights, running statistics, dropout's random numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.drop, self.last = (
            nn.BatchNorm1d(6),
            nn.Linear(6, 16),
            nn.Dropout(0.1),
            nn.Linear(16, 1),
        )

    def forward(self, x, labels):
        output = self.last(self.drop(torch.tanh(self.first(self.norm(x))))).squeeze(-1)
        return {"loss": (output - labels).square().mean(), "logits": output}


class Calls(TrainerCallback):
    def __init__(self):
        self.calls = []

    def on_step_end(self, args, state, control, **kwargs):
        self.calls.append(state.global_step)


def make_trainer(folder, build=None, **settings):
    torch.manual_seed(0)
    model = Model()
    optimizer = build(model) if build else None
    defaults = {"optim": "sgd_sai", "learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8}
    args = TrainingArguments(
        str(folder),
        **{**defaults, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **settings},
    )
    return Trainer(model, args, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=[Calls()])


def everything(trainer):
    """What a test could change, as comparable values."""
    return {
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "gradients": [p.grad for p in trainer.model.parameters()],
        "modes": [module.training for module in trainer.model.modules()],
        "random": (random.random(), float(numpy.random.rand()), float(torch.rand(()))),
        "state": vars(trainer.state).copy(),
        "control": vars(trainer.control).copy(),
        "args": trainer.args.to_dict(),
        "attributes": set(vars(trainer)),
        "callbacks": list(trainer.callback_handler.callbacks),
        "scheduler": trainer.lr_scheduler,
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "weights":
            for name, value in before[key].items():
                assert torch.equal(value, after[key][name]), name
        else:
            assert before[key] == after[key], key


OPTIMIZERS = {
    "made by Trainer": None,
    "given": lambda model: SGDSaI(model.named_parameters(), lr=1e-2),
    "given AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_after_the_test_is_the_training_without_it_to_the_bit(build, tmp_path):
    plain, tested = make_trainer(tmp_path / "plain", build), make_trainer(tmp_path / "tested", build)
    settings = {"smallest": 1e-4, "largest": 1.0, "steps": 12, "progress": False}
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    found = range_test(tested, **settings)
    tested.train()
    assert len(found.losses) > 1
    for (name, expected), value in zip(
        plain.model.state_dict().items(), tested.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, value), name
    losses = [entry["train_loss"] for trainer in (plain, tested) for entry in trainer.state.log_history[-1:]]
    assert losses[0] == losses[1]
    (calls,) = (callback.calls for callback in tested.callback_handler.callbacks if isinstance(callback, Calls))
    assert calls == list(range(1, 9))  # of the training alone


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_everything_is_as_before_also_between_two_trainings_and_after_an_error(build, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, build)
    trainer.train()
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer, saved = trainer.optimizer, trainer.optimizer.state_dict()
    saved = json.dumps(saved, default=lambda tensor: tensor.tolist())
    before, after = None, None
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(trainer.model.last, "forward", lambda x: 1 / 0)
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        before = everything(trainer)
        random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
        if fails:
            with pytest.raises(ZeroDivisionError):
                range_test(trainer, steps=10, progress=False)
        else:
            range_test(trainer, steps=10, progress=False)
        after = everything(trainer)
        assert_same(before, after)
        assert trainer.optimizer is optimizer
        assert json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist()) == saved


def test_rates_grow_evenly_on_a_logarithmic_scale_and_groups_keep_their_ratios(tmp_path):
    seen = []

    class Seen(SGDSaI):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def build(model):
        groups = [{"params": model.first.parameters(), "lr": 0.1}, {"params": model.last.parameters(), "lr": 0.4}]
        return Seen(groups)

    found = range_test(make_trainer(tmp_path, build), smallest=1e-4, largest=1e-2, steps=11, progress=False)
    assert found.learning_rates == pytest.approx([1e-4 * 10 ** (step / 5) for step in range(11)])
    assert [rates[1] for rates in seen] == pytest.approx(found.learning_rates)
    assert [rates[0] for rates in seen] == pytest.approx([rate / 4 for rate in found.learning_rates])


def test_nothing_is_written_and_the_test_ends_where_the_loss_diverges(tmp_path):
    trainer = make_trainer(
        tmp_path / "run", eval_strategy="no", optim="sgd", max_grad_norm=0.0, logging_strategy="steps", logging_steps=1
    )
    before = sorted(tmp_path.rglob("*"))
    found = range_test(trainer, smallest=1e-3, largest=1e6, steps=60, progress=False)
    assert found.diverged
    assert 5 < len(found.losses) < 60
    assert len(found.learning_rates) == len(found.losses)
    assert sorted(tmp_path.rglob("*")) == before
    assert trainer.state.log_history == []


def test_suggestion_is_a_third_of_the_rate_with_the_smallest_smoothed_loss():
    rates = tuple(10.0**power for power in range(-6, 6))
    losses = (4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 2.0, 1.0, 1.0, 9.0, 9.0, math.inf)
    test = RangeTest(rates, losses)
    smoothed = test.smoothed
    assert smoothed[0] == pytest.approx(4.0)
    assert smoothed[5] == pytest.approx((0.1 * 3 + 4 * (0.9 * (1 - 0.9**5))) / (1 - 0.9**6))
    assert smoothed.index(min(smoothed)) == 8
    assert test.suggestion == pytest.approx(rates[8] / 3)
    assert test.diverged


def test_an_easy_first_batch_is_not_taken_for_the_smallest_loss():
    losses = (0.1, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 2.0, 1.0, 1.0, 9.0)
    test = RangeTest(tuple(10.0**power for power in range(-6, 5)), losses)
    assert min(test.smoothed) == test.smoothed[0]
    assert test.suggestion == pytest.approx(10.0 ** (3) / 3)


def test_there_is_no_suggestion_where_the_loss_falls_and_stays_low():
    rates = tuple(10.0**power for power in range(-6, 6))
    still_falling = RangeTest(rates, (4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0))
    flat = RangeTest(rates, (4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 1.0, 1.0, 1.0, 1.1, 1.0, 1.2))
    assert still_falling.fell
    assert flat.fell
    assert still_falling.suggestion is None
    assert flat.suggestion is None


def test_there_is_no_suggestion_where_the_loss_never_fell():
    assert RangeTest((0.1,) * 8, (2.0,) * 8).suggestion is None
    assert RangeTest((0.1,) * 8, (math.nan,) * 8).suggestion is None
    assert RangeTest((0.1,) * 8, (math.nan,) * 8).diverged


BAD_SETTINGS = {
    "smallest above largest": ({"smallest": 2.0, "largest": 1.0}, "smallest is 2.0 and largest 1.0"),
    "smallest of 0": ({"smallest": 0.0}, "must be finite numbers above 0"),
    "equal": (
        {"smallest": 1.0, "largest": 1.0},
        "smallest is 1.0 and largest 1.0; they must be",
    ),
    "below 0": ({"smallest": -1.0}, "smallest is -1.0"),
    "not a number": ({"smallest": math.nan}, "smallest is nan"),
    "infinite": ({"largest": math.inf}, "largest inf"),
    "few steps": ({"steps": 9}, "steps is 9; it must be a whole number, at least 10"),
}
#: Which the command's parser refuses by itself.
NO_NUMBERS = {
    "a text": ({"smallest": "1e-5"}, "smallest is 1e-5 and largest 10.0; they must be finite numbers"),
    "nothing": ({"largest": None}, "largest None; they must be finite numbers"),
    "half a step": ({"steps": 10.5}, "steps is 10.5; it must be a whole number"),
}


@pytest.mark.parametrize(
    ("settings", "message"), [*BAD_SETTINGS.values(), *NO_NUMBERS.values()], ids=[*BAD_SETTINGS, *NO_NUMBERS]
)
def test_impossible_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        range_test(make_trainer(tmp_path), progress=False, **settings)


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_the_command_refuses_impossible_settings_before_the_script_begins(settings, message, tmp_path, capsys):
    (tmp_path / "train.py").write_text(f"open({str(tmp_path / 'begun')!r}, 'w')")
    options = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["lr-find", *options, str(tmp_path / "train.py")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "begun").exists()


def test_rates_may_be_as_far_apart_as_numbers_are(tmp_path):
    found = range_test(make_trainer(tmp_path), smallest=1e-308, largest=1e308, steps=11, progress=False)
    assert found.learning_rates[:2] == pytest.approx((1e-308, 10**-246.4))


def test_sharded_models_and_a_rate_of_zero_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.0)
    with pytest.raises(ValueError, match="the learning rate is 0"):
        range_test(trainer, progress=False)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="cannot put the weights of a sharded model back"):
        range_test(trainer, progress=False)


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-sai"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return str(path)


class EndedError(BaseException):
    """In the place of the end of the process."""


@pytest.fixture
def ended(monkeypatch):
    statuses = []

    def end(status):
        statuses.append(status)
        raise EndedError

    monkeypatch.setattr(lr_find, "_end", end)
    return statuses


OWN = ["--optim", "sgd_sai", "--output_dir", "run", "--use_cpu", "true", "--report_to", "none"]


def test_command_tests_an_unmodified_script_in_the_place_of_its_training(script, tmp_path, capsys, ended, caplog):
    with pytest.raises(EndedError):
        main(["lr-find", "--steps", "40", "--smallest", "1e-4", "--out", "found", script, *OWN])
    assert ended == [0]
    output = capsys.readouterr().out
    numbers = json.loads((tmp_path / "found" / "lr_find.json").read_text())
    assert f"try --learning_rate {numbers['suggestion']:.1e}, then a third and three times that" in output
    assert 1e-3 < numbers["suggestion"] < 10
    if importlib.util.find_spec("matplotlib"):
        assert str(tmp_path / "found" / "lr_find.png") in output
        assert (tmp_path / "found" / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "trained").exists()
    assert not (tmp_path / "run").exists()
    assert "learning_rate is 5e-05, the default" not in caplog.text
    assert Trainer.train.__name__ == "train"
    assert Trainer.train.__module__.startswith("transformers")


SAVES = """
import atexit, contextlib
@contextlib.contextmanager
def saving():
    try:
        yield
    finally:
        trainer.save_model()
atexit.register(lambda: Path("run/atexit").touch())
with saving():
    try:
        trainer.train()
    finally:
        trainer.save_model()
"""


def test_nothing_that_a_script_does_after_its_training_is_done_with_the_untrained_model(script, tmp_path):
    (tmp_path / "saves.py").write_text(SCRIPT.replace("trainer.train()", SAVES))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("the trained one")
    command = [sys.executable, "-m", "hf_sai.cli", "lr-find", "--steps", "12", "-m", "saves", *OWN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "run" / "model.safetensors").read_text() == "the trained one"
    assert "12 steps, learning rate 1e-05" in done.stdout


def test_a_module_of_the_working_directory_is_found_by_the_installed_command(script, tmp_path, ended, monkeypatch):
    monkeypatch.setattr(sys, "path", ["/nowhere/bin", *sys.path[1:]])
    with pytest.raises(EndedError):
        main(["lr-find", "--steps", "10", "-m", "train", *OWN])
    assert ended == [0]


def test_only_the_main_process_says_and_saves(script, tmp_path, ended, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    with pytest.raises(EndedError):
        main(["lr-find", "--steps", "10", "--out", "found", script, *OWN])
    assert ended == [0]
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("place", ["trainer =", "x.sum()}"])
def test_a_fault_of_the_script_is_shown_with_file_and_line(script, tmp_path, capsys, ended, place):
    faulty = {"trainer =": SCRIPT.replace("trainer =", "int('no number')\ntrainer ="),
              "x.sum()}": SCRIPT.replace("return {", "int('no number'); return {")}[place]  # fmt: skip
    (tmp_path / "faulty.py").write_text(faulty)
    with pytest.raises((SystemExit, EndedError)) as end:
        main(["lr-find", "--steps", "10", "faulty.py", *OWN])
    assert ended == [1] or end.value.code == 1
    shown = capsys.readouterr().err
    assert f'File "{tmp_path}/faulty.py", line' in shown
    assert shown.rstrip().endswith("ValueError: invalid literal for int() with base 10: 'no number'")
    assert "Traceback" in shown


def test_losses_that_are_not_finite_are_null_in_the_file(tmp_path):
    test = RangeTest((1e-3, 1e-2, 1e-1), (2.0, math.nan, math.inf))
    list(lr_find._save(test, tmp_path))
    assert json.loads((tmp_path / "lr_find.json").read_text())["losses"] == [2.0, None, None]


def test_what_was_found_is_told_where_no_picture_can_be_drawn(script, tmp_path, ended, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(EndedError):
        main(["lr-find", "--steps", "10", "--out", "found", script, *OWN])
    assert ended == [0]
    said = capsys.readouterr().out
    assert "10 steps, learning rate 1e-05 to 10" in said
    assert 'no picture: pictures need matplotlib: pip install "hf-sai[plots]"' in said
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["lr_find.json"]


def test_what_was_found_is_told_where_nothing_can_be_saved(script, tmp_path, ended, capsys):
    (tmp_path / "found").write_text("a file is in the way")
    with pytest.raises(EndedError):
        main(["lr-find", "--steps", "10", "--out", "found", script, *OWN])
    assert ended == [1]
    said = capsys.readouterr()
    assert "10 steps, learning rate 1e-05 to 10" in said.out
    assert said.err.splitlines()[-1].startswith("hf-sai: ")
    assert str(tmp_path / "found") in said.err.splitlines()[-1]


def test_command_refuses_a_missing_script_and_one_that_never_trains(script, tmp_path, capsys):
    assert main(["lr-find", "nowhere.py"]) == 1
    assert "no script 'nowhere.py'" in capsys.readouterr().err
    (tmp_path / "idle.py").write_text("pass")
    assert main(["lr-find", str(tmp_path / "idle.py")]) == 1
    assert "ended without calling Trainer.train()" in capsys.readouterr().err


def test_picture_stands_a_loss_that_is_not_finite():
    pytest.importorskip("matplotlib")
    test = RangeTest((1e-3, 1e-2, 1e-1), (2.0, 1.0, math.inf))
    assert plot_range_test(test).axes[0].get_ylim()[1] < 3
