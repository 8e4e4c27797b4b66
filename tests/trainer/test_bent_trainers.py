"""Trainer as its users bend it: groups of their own, rates by name, several calls of train()."""

import logging

import pytest
import torch
from trainer_cases import ROWS, arguments, plain_trainer, tiny_gpt2
from transformers import Trainer, TrainerCallback

import hf_sai
from hf_sai.runs.meters import unwrap_optimizer
from hf_sai.trainer.small_updates import watch_updates


def lora_gpt2(**more):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **more)
    return peft.get_peft_model(tiny_gpt2(), config)


def groups_of(trainer):
    trainer.create_optimizer()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert type(optimizer) is hf_sai.SGDSaI
    return {group["name"]: group for group in optimizer.param_groups}


class NoEmbeddingDecay(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if ".wte." not in name]


class BiasDecay(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]


def test_decay_names_of_a_subclass_hold(tmp_path):
    groups = groups_of(plain_trainer(tmp_path, cls=NoEmbeddingDecay))
    assert "transformer.wte.weight" in groups["base/no_decay"]["param_names"]
    assert "transformer.wpe.weight" in groups["base/decay"]["param_names"]
    assert (groups["base/decay"]["weight_decay"], groups["base/no_decay"]["weight_decay"]) == (0.1, 0.0)
    groups = groups_of(plain_trainer(tmp_path, cls=BiasDecay))
    assert list(groups) == ["base/decay"]
    assert len(groups["base/decay"]["param_names"]) == len(list(tiny_gpt2().parameters()))


def test_decay_names_of_a_subclass_hold_with_adapters_and_roles_are_added(tmp_path):
    class NoDecayOfA(Trainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if "lora_A" not in name]

    groups = groups_of(plain_trainer(tmp_path, lora_gpt2(), cls=NoDecayOfA, optim_args="lr_ratios=lora_B:4"))
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"default/lora_A": 0.0, "default/lora_B": 0.1}
    assert {name: group["lr"] for name, group in groups.items()} == {"default/lora_A": 1e-2, "default/lora_B": 4e-2}
    assert {group["normalize_over"] for group in groups.values()} == {"default"}


def test_an_unchanged_trainer_groups_as_param_groups_does(tmp_path):
    groups = groups_of(plain_trainer(tmp_path, lora_gpt2(use_dora=True)))
    expected = hf_sai.param_groups(lora_gpt2(use_dora=True), lr=1e-2, weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in expected] == [
        (name, group["weight_decay"]) for name, group in groups.items()
    ]
    assert groups["default/magnitude"]["weight_decay"] == 0.0


def test_rates_by_name_as_sentence_transformers_sets_them_hold(tmp_path):
    class RatesByName(Trainer):
        def get_optimizer_cls_and_kwargs(self, args, model=None):
            cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
            assert not {"params", "model", "optimizer_dict"} & kwargs.keys()
            embeddings = [p for name, p in model.named_parameters() if "wte" in name]
            others = [p for name, p in model.named_parameters() if "wte" not in name]
            of_the_loss = torch.nn.Parameter(torch.ones(3))
            kwargs["optimizer_dict"] = [
                {"params": others, "weight_decay": args.weight_decay},
                {"params": [], "weight_decay": 0.0},
                {"params": embeddings, "lr": 5e-3, "weight_decay": args.weight_decay},
                {"params": [of_the_loss], "lr": 1e-3, "weight_decay": 0.0},
            ]
            return cls, kwargs

    trainer = plain_trainer(tmp_path, cls=RatesByName)
    trainer.train()
    groups = {group["name"]: group for group in unwrap_optimizer(trainer.optimizer).param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {
        "base/decay": 1e-2, "base/decay 2": 5e-3, "base/no_decay": 1e-3,
    }  # fmt: skip
    assert groups["base/decay 2"]["param_names"] == ["transformer.wte.weight"]
    assert groups["base/no_decay"]["param_names"] == ["parameter 0"]


@pytest.mark.parametrize("named", [False, True])
def test_an_override_of_create_optimizer_passes_its_own_groups(tmp_path, named):
    class OwnGroups(Trainer):
        def create_optimizer(self, *args, **kwargs):
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            pairs = list(self.model.named_parameters())
            groups = [
                {"params": pairs[:2] if named else [p for _, p in pairs[:2]], "weight_decay": 0.5, "name": "first"},
                {"params": pairs[2:] if named else [p for _, p in pairs[2:]], "momentum": 0.5},
            ]
            self.optimizer = cls(groups, **options)
            return self.optimizer

    groups = groups_of(plain_trainer(tmp_path, cls=OwnGroups))
    assert {name: (group["weight_decay"], group["momentum"]) for name, group in groups.items()} == {
        "first": (0.5, 0.9), "base/decay": (0.1, 0.5),
    }  # fmt: skip
    assert groups["first"]["param_names"] == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_an_override_may_leave_rate_and_decay_to_its_groups(tmp_path):
    model = tiny_gpt2()
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path), model)
    del options["lr"], options["weight_decay"]
    optimizer = cls([{"params": list(model.parameters()), "lr": 0.3, "weight_decay": 0.2}], **options)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.2)]


def test_frozen_roles_stay_out_of_groups_that_somebody_else_made(tmp_path):
    model = lora_gpt2()
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="freeze=lora_A"), model)
    optimizer = cls([p for p in model.parameters() if p.requires_grad], **options)
    assert [group["name"] for group in optimizer.param_groups] == ["default/lora_B"]


# --- a second train()


def test_an_adapter_that_was_added_between_two_calls_of_train_trains(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = plain_trainer(tmp_path, lora_gpt2())
    trainer.train()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    trainer.model.add_adapter("second", config)
    trainer.model.set_adapter("second")
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if ".second." in name}
    trainer.train()
    names = [group["name"] for group in unwrap_optimizer(trainer.optimizer).param_groups]
    assert names == ["default/lora_A", "default/lora_B", "second/lora_A", "second/lora_B"]
    assert before
    assert not any(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


def test_what_an_override_left_out_stays_out(tmp_path):
    class OnlyNorms(Trainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = cls([p for n, p in self.model.named_parameters() if "ln_" in n], **options)
            return super().create_optimizer(*args, **kwargs)

    trainer = plain_trainer(tmp_path, cls=OnlyNorms)
    trainer.train()
    trainer.train()
    assert len(unwrap_optimizer(trainer.optimizer).param_groups) == 1


class Unfreeze(TrainerCallback):
    def __init__(self, name):
        self.name = name

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.get_parameter(self.name).requires_grad_(True)


def test_what_is_unfrozen_in_training_is_named_once_and_trained_by_the_next_train(tmp_path, caplog):
    model, name = tiny_gpt2(), "transformer.wpe.weight"
    model.get_parameter(name).requires_grad_(False)
    before = model.get_parameter(name).detach().clone()
    trainer = plain_trainer(tmp_path, model)
    trainer.args.max_steps = 4
    trainer.add_callback(Unfreeze(name))
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer.train()
    assert [name in record.message for record in caplog.records if "were unfrozen" in record.message] == [True]
    assert torch.equal(model.get_parameter(name), before)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer.train()  # the way out that it tells
    assert not [record.message for record in caplog.records if "were unfrozen" in record.message]
    assert not torch.equal(model.get_parameter(name), before)


def late(caplog, trainer):
    """What a second train() says of arguments that came too late."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer.train()
    return [record.message for record in caplog.records if "what was changed since has no effect" in record.message]


CHANGES = {
    "learning_rate": (0.5, "learning_rate=0.5 (in force: 0.01)"),
    "weight_decay": (0.3, "weight_decay=0.3 (in force: 0.1)"),
    "optim": ("adamw_torch", "optim=adamw_torch (in force: sgd_sai)"),
    "optim_args": ("momentum=0.5", "optim_args=momentum=0.5 (in force: None)"),
}


def test_arguments_that_were_changed_after_the_optimizer_was_built_are_named_in_one_warning(tmp_path, caplog):
    trainer = plain_trainer(tmp_path)
    assert late(caplog, trainer) == []
    assert late(caplog, trainer) == []  # nothing was changed
    trainer.args.max_steps, trainer.args.warmup_steps, trainer.args.max_grad_norm = 4, 2, 0.5  # these have an effect
    assert late(caplog, trainer) == []
    for name, (value, _) in CHANGES.items():
        setattr(trainer.args, name, value)
    (words,) = late(caplog, trainer)
    for _, said in CHANGES.values():
        assert said in words
    (group, *_) = unwrap_optimizer(trainer.optimizer).param_groups
    assert (group["initial_lr"], group["weight_decay"], group["momentum"]) == (1e-2, 0.1, 0.9)
    trainer.args.optim = "sgd_sai"
    trainer.optimizer = trainer.lr_scheduler = None  # the way out that it tells
    assert late(caplog, trainer) == []
    (group, *_) = unwrap_optimizer(trainer.optimizer).param_groups
    assert (group["initial_lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.3, 0.5)
    trainer.args.optim_args = None
    assert ["optim_args=None (in force: momentum=0.5)" in words for words in late(caplog, trainer)] == [True]


def test_our_name_asked_for_after_another_optimizer_was_built_is_warned_of(tmp_path, caplog):
    trainer = plain_trainer(tmp_path, optim="adamw_torch")
    trainer.train()
    trainer.args.learning_rate = 0.5
    assert late(caplog, trainer) == []  # which is Trainer's own affair
    trainer.args.optim = "sgd_sai"
    (words,) = late(caplog, trainer)
    assert "optim=sgd_sai (in force: adamw_torch)" in words


def test_arguments_that_the_groups_were_given_as_well_are_in_force(tmp_path, caplog):
    trainer = plain_trainer(tmp_path)
    trainer.train()
    trainer.args.learning_rate, trainer.args.weight_decay = 0.5, 0.3
    for group in trainer.optimizer.param_groups:
        group["initial_lr"], group["weight_decay"] = 0.5, 0.3
    assert late(caplog, trainer) == []


def test_an_optimizer_that_trainer_was_given_is_not_spoken_of(tmp_path, caplog):
    model = tiny_gpt2()
    optimizer = hf_sai.create_sgd_sai_optimizer(model, lr=1e-2)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train()
    trainer.args.learning_rate = 0.5
    assert late(caplog, trainer) == []


# --- learning rates that train nothing


def warnings_of(caplog, trainer):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        trainer.train()
    return [record.message for record in caplog.records if "An update moves the weights" in record.message]


@pytest.mark.parametrize("model", [tiny_gpt2, lora_gpt2])
def test_a_rate_written_out_that_trains_nothing_is_warned_about(tmp_path, caplog, model):
    (words,) = warnings_of(caplog, plain_trainer(tmp_path, model(), learning_rate=5e-7, max_steps=8))
    assert "of their size at learning rate 5e-07" in words
    assert "sgd_sai_factored, which takes AdamW's" in words


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-2},
        {"learning_rate": 1e-2, "warmup_steps": 1000, "max_steps": 8},
        {"learning_rate": 5e-7, "optim": "sgd_sai_factored"},
        {"learning_rate": 5e-7, "optim": "adamw_torch"},
        {"learning_rate": 1e-2, "optim_args": "gradient_release=true", "max_grad_norm": 0.0},
        {"learning_rate": 5e-7, "max_steps": 3},
    ],
)
def test_rates_that_train_are_not_warned_about(tmp_path, caplog, options):
    assert warnings_of(caplog, plain_trainer(tmp_path, **options)) == []


def test_advice_that_fails_ends_no_training(monkeypatch):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = hf_sai.SGDSaI([p], lr=1e-7)
    tried = []

    def fails(meter):
        tried.append(meter)
        raise RuntimeError("no room")

    monkeypatch.setattr("hf_sai.trainer.small_updates.UpdateMeter.before", fails)
    watch_updates(optimizer)
    for _ in range(6):
        p.grad = torch.tensor([1.0, -1.0, 2.0])
        optimizer.step()
    assert len(tried) == 1


def test_a_hook_of_the_users_after_ours_ends_no_training():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = hf_sai.SGDSaI([p], lr=1e-2)
    steps = []
    watch_updates(optimizer)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for _ in range(8):  # torch's iterator failed here at the fifth, when ours had taken itself away
        p.grad = torch.tensor([1.0, -1.0, 2.0])
        optimizer.step()
    assert len(steps) == 8


def test_only_the_main_process_warns(tmp_path, caplog, monkeypatch):
    from transformers import TrainingArguments

    from hf_sai.trainer import building

    building._warn_once.cache_clear()
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    args = arguments(tmp_path, learning_rate=5e-5)
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        Trainer(tiny_gpt2(), args, train_dataset=ROWS).create_optimizer()
    assert caplog.records == []
