"""``--optim sgd_sai_averaged``: what Trainer saves, loads and ends with are the means."""

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import ROWS, arguments, plain_trainer, tiny_gpt2
from transformers import Trainer, TrainerCallback

from hf_sai import create_sgd_sai_optimizer
from hf_sai.runs.meters import unwrap_optimizer

OPTIONS = {"optim": "sgd_sai_averaged", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}


def trained(folder, steps=6, resume=None, **more):
    trainer = plain_trainer(folder, **{**OPTIONS, "max_steps": steps, **more})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def in_checkpoint(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other, names=None):
    for name in names or one:
        assert torch.equal(one[name], other[name]), name


def test_a_run_ends_with_the_means(tmp_path):
    trainer = trained(tmp_path)
    shown = weights_of(trainer)
    unwrap_optimizer(trainer.optimizer).train()
    assert not any(torch.equal(shown[name], p) for name, p in weights_of(trainer).items())


def test_a_checkpoint_holds_the_means_and_the_run_goes_on_from_it_as_if_nothing_had_been_saved(tmp_path):
    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=3)
    short = trained(tmp_path / "short", steps=3)
    saved = in_checkpoint(tmp_path / "whole/checkpoint-3")
    assert_same(saved, weights_of(short), names=saved)
    resumed = trained(tmp_path / "whole", resume=str(tmp_path / "whole/checkpoint-3"))
    assert_same(weights_of(whole), weights_of(resumed))
    never_saved = trained(tmp_path / "unsaved")
    for name, p in weights_of(whole).items():  # the way to the mean and back rounds
        if name.endswith("c_attn.bias"):  # the keys' has a gradient of nothing but rounding
            continue
        torch.testing.assert_close(p, weights_of(never_saved)[name], rtol=1e-5, atol=1e-6)


def test_epochs_are_saved_as_means_too(tmp_path):
    trained(tmp_path / "by_epoch", steps=20, save_strategy="epoch")
    short = trained(tmp_path / "short", steps=16)
    saved = in_checkpoint(tmp_path / "by_epoch/checkpoint-16")
    assert_same(saved, weights_of(short), names=saved)


@pytest.mark.parametrize("steps", [4, 6], ids=["ends at an evaluation", "ends after one"])
def test_the_best_model_is_loaded_as_it_was_saved(tmp_path, steps):
    trainer = trained(
        tmp_path,
        steps=steps,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    best = in_checkpoint(tmp_path / trainer.state.best_model_checkpoint.split("/")[-1])
    assert_same(best, weights_of(trainer), names=best)


def test_a_decaying_rate_is_warned_of(tmp_path, caplog):
    trained(tmp_path, lr_scheduler_type="linear")
    assert "lr_scheduler_type is linear" in caplog.text
    caplog.clear()
    trained(tmp_path)
    assert "lr_scheduler_type" not in caplog.text


def test_a_run_that_goes_on_averages_if_its_checkpoint_does_whatever_is_asked_for(tmp_path, caplog):
    trained(tmp_path, steps=3, save_strategy="steps", save_steps=3)
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-3"), optim="sgd_sai_factored")
    assert "update=averaged (asked for: factored)" in caplog.text
    assert all(group["means_shown"] for group in unwrap_optimizer(resumed.optimizer).param_groups)


def test_what_a_callback_saves_when_something_is_logged_are_means(tmp_path):
    class SaveOnLog(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    trainer = plain_trainer(
        tmp_path, callbacks=[SaveOnLog()], **{**OPTIONS, "logging_steps": 1, "save_strategy": "steps"}
    )
    trainer.train()
    short = trained(tmp_path / "short", steps=3)
    saved = in_checkpoint(tmp_path / "checkpoint-3")
    assert_same(saved, weights_of(short), names=saved)


def test_an_optimizer_of_another_kind_that_comes_later_is_left_alone(tmp_path, caplog):
    trainer = trained(tmp_path, steps=3)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.args.optim, trainer.args.lr_scheduler_type, trainer.args.max_steps = "adamw_torch", "linear", 6
    trainer.train()
    assert "averaged" not in caplog.text


def test_an_optimizer_of_the_users_own_is_shown_too(tmp_path):
    model = tiny_gpt2()
    optimizer = create_sgd_sai_optimizer(model, lr=1e-2, update="averaged")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = Trainer(
        model, arguments(tmp_path, optim="adamw_torch"), train_dataset=ROWS, optimizers=(optimizer, scheduler)
    )
    trainer.train()
    assert all(group["means_shown"] for group in optimizer.param_groups)
