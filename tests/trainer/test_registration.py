"""``--optim sgd_sai`` in transformers; also run against the oldest supported release (``make test-oldest``)."""

import copy
import json
import logging
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from trainer_cases import plain_trainer
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_sai
from hf_sai.trainer import building
from hf_sai.trainer.registration import OPTIMIZER_NAMES, register


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x, labels):
        return {"loss": (self.norm(self.linear(x)) - labels).square().mean()}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(4, generator=generator), "labels": torch.randn(3, generator=generator)}


def arguments(folder, cls=TrainingArguments, **options):
    defaults = {
        "output_dir": str(folder),
        "optim": "sgd_sai",
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return cls(**{**defaults, **options})


def trainer(folder, **options):
    return Trainer(model=Regression(), args=arguments(folder, **options), train_dataset=Rows())


# --- the name


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments])
def test_training_arguments_accept_the_name(cls, tmp_path):
    args = arguments(tmp_path, cls)
    assert args.optim == "sgd_sai"
    assert args.optim is OptimizerNames("sgd_sai")
    assert args.to_dict()["optim"] == "sgd_sai"
    assert json.loads(args.to_json_string())["optim"] == "sgd_sai"


def test_set_optimizer_accepts_the_name(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch").set_optimizer("sgd_sai", learning_rate=0.02, weight_decay=0.1)
    assert (args.optim, args.learning_rate, args.weight_decay) == ("sgd_sai", 0.02, 0.1)


def test_the_command_line_accepts_the_name_and_lists_it(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "sgd_sai"])
    assert args.optim == "sgd_sai"
    with pytest.raises(ValueError, match="sgd_sai"):
        TrainingArguments(str(tmp_path), optim="sgd_say")


def test_trl_configs_and_parser_accept_the_name(tmp_path):
    trl = pytest.importorskip("trl")
    options = ["--output_dir", str(tmp_path), "--optim", "sgd_sai", "--use_cpu", "--bf16", "false"]
    (args,) = trl.TrlParser(trl.SFTConfig).parse_args_and_config(options)
    assert args.optim == "sgd_sai"


ORDERS = {
    "hf_sai first": "import hf_sai; from transformers import TrainingArguments, HfArgumentParser",
    "transformers first": "import transformers, hf_sai; from transformers import TrainingArguments, HfArgumentParser",
    "arguments first": "from transformers import TrainingArguments, HfArgumentParser; import hf_sai",
    "Trainer first": "from transformers import Trainer, TrainingArguments, HfArgumentParser; import hf_sai",
    "a thread": """
import threading, hf_sai
threads = [threading.Thread(target=__import__, args=(f"transformers.{m}",)) for m in ("trainer", "training_args")]
[t.start() for t in threads]; [t.join() for t in threads]
from transformers import TrainingArguments, HfArgumentParser""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_names_are_there_in_whatever_order_one_imports(order):
    done = run_python(
        ORDERS[order]
        + """
parser = HfArgumentParser(TrainingArguments)
(args,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--optim", "sgd_sai_factored_8bit", "--use_cpu"])
from transformers import Trainer
print(args.optim.value, Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum_dtype"])
"""
    )
    assert done.stdout.split() == ["sgd_sai_factored_8bit", "8bit"], done.stderr


def test_nine_names_stand_for_three_rules_and_three_momenta_and_one_for_the_mean():
    rules = ("sgd_sai", "sgd_sai_factored", "sgd_sai_orthogonal")
    nine = {rule + momentum for rule in rules for momentum in ("", "_4bit", "_8bit")}
    assert set(OPTIMIZER_NAMES) == nine | {"sgd_sai_averaged"}
    assert set(OPTIMIZER_NAMES) <= {name.value for name in OptimizerNames}
    assert OptimizerNames.SGD_SAI is OptimizerNames("sgd_sai") is OptimizerNames["SGD_SAI"]
    assert OptimizerNames.SGD_SAI_FACTORED_4BIT.value == "sgd_sai_factored_4bit"


def test_transformers_that_has_changed_costs_a_warning_and_a_clear_error_when_the_name_is_used():
    done = run_python(
        """
        import hf_sai
        from hf_sai.trainer import registration
        def changed(trainer):
            raise AttributeError("no get_optimizer_cls_and_kwargs")
        import hf_sai.imports as imports
        imports._waiting.clear()
        registration._wrap_trainer = changed
        registration.register()
        from transformers import Trainer, TrainingArguments
        import torch
        Trainer(torch.nn.Linear(1, 1), TrainingArguments("out", report_to=[], use_cpu=True))
        try:
            Trainer(torch.nn.Linear(1, 1), TrainingArguments("out", optim="sgd_sai", report_to=[], use_cpu=True))
        except ValueError as error:
            print(error)
        """
    )
    assert "transformers.trainer is not as hf-sai knows it (AttributeError: no get_optim" in done.stdout, done.stderr
    assert "create_sgd_sai_optimizer" in done.stdout
    assert done.stderr.count("is not as hf-sai knows it") == 1


def test_registering_twice_is_harmless():
    before = list(OptimizerNames)
    seam = Trainer.get_optimizer_cls_and_kwargs
    register()
    assert list(OptimizerNames) == before
    assert Trainer.get_optimizer_cls_and_kwargs is seam
    assert [name.value for name in OptimizerNames].count("sgd_sai") == 1


def test_the_member_survives_copying_and_other_names_are_untouched(tmp_path):
    args = arguments(tmp_path)
    assert copy.deepcopy(args).optim == "sgd_sai"
    assert pickle.loads(pickle.dumps(args)).optim == "sgd_sai"
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd"))
    assert cls is torch.optim.SGD
    assert kwargs == {"lr": 1e-2}


def run_python(source, *argv):
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_training_args_bin_loads_where_hf_sai_is_not_imported(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    done = run_python(
        """
        import sys, torch
        args = torch.load(sys.argv[1], weights_only=False)
        assert "hf_sai" not in sys.modules
        print(args.optim, type(args.optim).__name__)
        """,
        tmp_path / "training_args.bin",
    )
    assert done.stdout.split() == ["sgd_sai", "str"], done.stderr


def test_a_spawned_worker_takes_the_arguments_and_does_not_hang(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            def name(args):
                return args.optim, "hf_sai" in sys.modules
            if __name__ == "__main__":
                import hf_sai
                from transformers import TrainingArguments
                args = TrainingArguments("out", optim="sgd_sai", learning_rate=0.01, report_to=[])
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(*pool.apply(name, (args,)))
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.split() == ["sgd_sai", "False"], done.stderr


# --- what Trainer builds


def test_trainer_trains_with_named_groups_and_applies_weight_decay_where_it_belongs(tmp_path):
    run = trainer(tmp_path, weight_decay=0.1, optim_args="momentum=0.8,eps=1e-6")
    run.train()
    optimizer = run.optimizer.optimizer if hasattr(run.optimizer, "optimizer") else run.optimizer
    assert type(optimizer) is hf_sai.SGDSaI
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["base/decay"]["param_names"] == ["linear.weight"]
    assert groups["base/decay"]["weight_decay"] == 0.1
    assert sorted(groups["base/no_decay"]["param_names"]) == ["linear.bias", "norm.bias", "norm.weight"]
    assert groups["base/no_decay"]["weight_decay"] == 0.0
    assert {(group["momentum"], group["eps"]) for group in groups.values()} == {(0.8, 1e-6)}
    assert not optimizer.gsnr_report().unmeasured


def test_trainer_equals_a_plain_loop(tmp_path):
    run = trainer(tmp_path, weight_decay=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, seed=3)
    seen = []
    run.data_collator = lambda rows, collate=run.data_collator: seen.append(collate(rows)) or seen[-1]
    run.train()
    model = Regression()
    optimizer = hf_sai.create_sgd_sai_optimizer(model, lr=1e-2, weight_decay=0.1)
    for batch in seen[:8]:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    for trained, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(trained, expected)


def test_resume_continues_exactly_and_measures_nothing_again(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=8)
    whole.train()
    first = trainer(tmp_path / "parts", max_steps=8, save_strategy="steps", save_steps=4)
    first.train()
    resumed = trainer(tmp_path / "parts", max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accelerate_load_state_keeps_gsnr(tmp_path):
    from accelerate import Accelerator

    def prepare():
        model = Regression()
        return accelerator.prepare(model, hf_sai.create_sgd_sai_optimizer(model, lr=1e-2))

    def train(model, optimizer, seed):
        torch.manual_seed(seed)
        accelerator.backward(model(torch.randn(8, 4), torch.randn(8, 3))["loss"])
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True)
    model, optimizer = prepare()
    train(model, optimizer, 0)
    accelerator.save_state(tmp_path)
    expected = [row.gsnr for row in optimizer.optimizer.gsnr_report()]
    train(model, optimizer, 1)
    accelerator.load_state(tmp_path)
    train(model, optimizer, 2)
    assert [row.gsnr for row in optimizer.optimizer.gsnr_report()] == expected


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("momentum", "'momentum' in 'momentum' is not of the form key=value"),
        ("momentum=0.9,", "is not of the form key=value"),
        ("betas=0.9", "unknown key 'betas'"),
        ("momentum=1.5", r"momentum must be a number in \[0, 1\), but is '1.5'"),
        ("weight_decay=0.1", "set by --weight_decay"),
        ("lr_ratios=lora_B:4", "lora_B"),
    ],
)
def test_wrong_optim_args_stop_the_training_before_it_starts(optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, optim_args=optim_args).train()


def test_optim_args_may_be_a_mapping_as_in_yaml(tmp_path):
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args={"momentum": 0.5}), Regression())
    assert kwargs["momentum"] == 0.5


def test_without_a_model_the_caller_groups_and_grouping_options_are_refused(tmp_path):
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, weight_decay=0.2))
    assert cls is hf_sai.SGDSaI
    assert kwargs == {"lr": 1e-2, "weight_decay": 0.2}
    with pytest.raises(ValueError, match=r"freeze=.* needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim_args="freeze=lora_A"))


def test_the_default_learning_rate_is_warned_about_once(tmp_path, caplog):
    building._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_sai"):
        for _ in range(2):
            Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, learning_rate=5e-5), Regression())
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path), Regression())
    assert len(caplog.records) == 1
    assert "try --learning_rate 1e-2" in caplog.text
    assert "sgd_sai_factored, which takes AdamW's" in caplog.text


def test_the_default_learning_rate_is_warned_about_where_a_matrix_is_made_orthogonal(tmp_path, caplog):
    def said(**options):
        building._warn_once.cache_clear()
        caplog.clear()
        trainer(tmp_path, **options).create_optimizer()
        return "try --learning_rate 8e-3" in caplog.text

    linear = {"optim": "sgd_sai_orthogonal", "optim_args": "matrices=linear.weight:true"}
    assert said(**linear, learning_rate=5e-5)
    assert not said(**linear)
    assert not said(optim="sgd_sai_orthogonal", learning_rate=5e-5)  # no hidden matrix, as in a LoRA
    assert not said(optim="sgd_sai_factored", learning_rate=5e-5)


def test_the_table_of_transformers_knows_the_name():
    table = pytest.importorskip("transformers.trainer_optimizer", reason="transformers before 5.2 has no table")
    assert "sgd_sai" in table._OPTIMIZER_HANDLERS


# --- the low-bit names and what reaches the optimizer with them


@pytest.mark.parametrize(
    ("name", "optim_args", "expected"),
    [
        ("sgd_sai_8bit", None, "8bit"),
        ("sgd_sai_4bit", "momentum=0.8", "4bit"),
        ("sgd_sai", "momentum_dtype=bfloat16", torch.bfloat16),
    ],
)
def test_low_bit_names_set_the_momentum(name, optim_args, expected, tmp_path):
    if isinstance(expected, str):
        pytest.importorskip("bitsandbytes")
    run = trainer(tmp_path, optim=name, optim_args=optim_args)
    run.train()
    assert run.optimizer.optimizer.defaults["momentum_dtype"] == expected
    assert not run.optimizer.optimizer.gsnr_report().unmeasured


def test_the_factored_names_bring_a_momentum_that_optim_args_may_change(tmp_path):
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd_sai_factored"))
    assert (kwargs["update"], kwargs["momentum"]) == ("factored", 0.8)
    changed = arguments(tmp_path, optim="sgd_sai_factored", optim_args="momentum=0.9,update=factored")
    assert Trainer.get_optimizer_cls_and_kwargs(changed)[1]["momentum"] == 0.9
    run = trainer(tmp_path, optim="sgd_sai_factored", learning_rate=1e-3)
    run.train()
    assert {(group["update"], group["momentum"]) for group in run.optimizer.param_groups} == {("factored", 0.8)}


def test_the_orthogonal_name_sorts_the_models_matrices(tmp_path):
    run = plain_trainer(tmp_path, optim="sgd_sai_orthogonal", learning_rate=1e-3, optim_args="matrices=c_fc:false")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    assert {name: group["update"] for name, group in groups.items()} == {
        "base/decay": "factored", "base/no_decay": "factored", "base/linear_transposed": "orthogonal",
    }  # fmt: skip
    hidden = groups["base/linear_transposed"]["param_names"]
    assert hidden
    assert not any("c_fc" in name or "wte" in name for name in hidden)
    assert all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    with pytest.raises(ValueError, match="update=orthogonal needs the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd_sai_orthogonal"))


def test_error_on_matrices_without_the_rule_that_has_them(tmp_path):
    with pytest.raises(ValueError, match="matrices is for update='orthogonal'"):
        trainer(tmp_path, optim="sgd_sai_factored", optim_args="matrices=c_fc:false").create_optimizer()


def test_a_name_and_another_rule_contradict(tmp_path):
    args = arguments(tmp_path, optim="sgd_sai_factored_8bit", optim_args="update=rows")
    with pytest.raises(
        ValueError, match="update=rows contradicts --optim sgd_sai_factored_8bit; use --optim sgd_sai_8bit"
    ):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_a_low_bit_name_and_another_momentum_dtype_contradict(tmp_path):
    with pytest.raises(ValueError, match=r"momentum_dtype=torch.float32 contradicts --optim sgd_sai_8bit"):
        trainer(tmp_path, optim="sgd_sai_8bit", optim_args="momentum_dtype=float32").create_optimizer()


def test_gradient_release_through_trainer_trains_alike(tmp_path):
    plain = trainer(tmp_path, max_grad_norm=0.0)
    released = trainer(tmp_path, max_grad_norm=0.0, optim_args="gradient_release=true")
    assert plain.train().training_loss == released.train().training_loss
    assert all(map(torch.equal, plain.model.parameters(), released.model.parameters()))


def test_a_train_that_was_interrupted_before_its_step_leaves_nothing_to_the_next(tmp_path):
    class Interrupts(TrainerCallback):
        done = False

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    interrupted = trainer(tmp_path, optim_args="gradient_release=true", max_grad_norm=0, max_steps=3)
    interrupted.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.train()
    assert interrupted.state.global_step == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "--max_grad_norm 1.0"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "steps 2"),
        ({"max_grad_norm": 0, "auto_find_batch_size": True}, "--auto_find_batch_size True"),
    ],
)
def test_gradient_release_refuses_what_excludes_it(options, named, tmp_path):
    with pytest.raises(ValueError, match=f"{named} exclude each other"):
        trainer(tmp_path, optim_args="gradient_release=true", **options).create_optimizer()
