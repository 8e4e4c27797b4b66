"""The callback: a record of any Trainer run, scalars in report_to, resume without loss, and loops without Trainer."""

import json
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch
from trainer_cases import ROWS, arguments, plain_trainer, tiny_gpt2, trainer_for
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hf_sai
from hf_sai.runs import meters
from hf_sai.runs import recorder as recorder_module
from hf_sai.runs.describe import optimizer_line, optimizer_scalars
from hf_sai.runs.record import RECORD_FILE, RunRecord
from hf_sai.runs.recorder import RunRecorder
from hf_sai.trainer.callbacks import RunRecordCallback


def test_one_line_leaves_a_record_beside_the_model(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.evaluate()  # before training
    trainer.train()
    trainer.evaluate()
    record = RunRecord.load(tmp_path)
    assert record.run["status"] == "finished"
    assert record.run["steps"] == 6
    assert [step for step, _ in record.curve("loss")] == [2, 4, 6]
    assert [step for step, _ in record.curve("eval_loss")] == [0, 6]
    assert record.settings["weight_decay"] == 0.1
    assert record.settings["optim"] == "sgd_sai"
    assert record.model["class"] == "GPT2LMHeadModel"
    assert record.model["type"] == "gpt2"
    assert record.optimizer["options"]["weight_decay"] == 0.1
    assert {g["name"] for g in record.optimizer["groups"]} == {"base/decay", "base/no_decay"}
    assert record.gsnr["parameters"][0]["name"] == "transformer.wte.weight"
    assert record.timing["steps"] == 6
    assert 0 < record.optimizer_share < 1
    assert record.data == [{"name": "counting", "license": "cc0-1.0"}]


def test_the_peak_rate_is_recorded_not_the_decayed_one(tmp_path):
    trainer_for(tmp_path, lr_scheduler_type="cosine").train()
    assert {g["lr"] for g in RunRecord.load(tmp_path).optimizer["groups"]} == {1e-2}


def test_scalars_reach_tensorboard_and_the_log_history(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    options = {"logging_dir": str(tmp_path / "tb")} if "logging_dir" in TrainingArguments.__dataclass_fields__ else {}
    trainer = trainer_for(tmp_path / "run", report_to="tensorboard", **options)
    trainer.train()
    events = accumulator.EventAccumulator(str(next((tmp_path / "tb").rglob("events.*")).parent)).Reload()
    expected = {
        f"train/sai/{name}"
        for name in (
            "gsnr_unmeasured",
            "wall_time/optimizer",
            "wall_time/record",
            *(f"{k}/base/{g}" for k in ("gsnr_over_sqrt_n", "lr", "update_ratio") for g in ("decay", "no_decay")),
        )
    }
    assert expected <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/sai/update_ratio/base/decay")] == [2, 4, 6]
    assert "sai/gsnr_unmeasured" in trainer.state.log_history[0]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_scalars_reach_the_trackers_that_report_to_names(tmp_path, monkeypatch, tracker):
    service = MagicMock(__spec__=ModuleSpec(tracker, None), __version__="0.30.0")
    for name in (tracker, f"{tracker}.sdk", f"{tracker}.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, service)
    config = MagicMock(ConfigError=type("ConfigError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, f"{tracker}.sdk.lib.config_util", config)
    service.context_vars.current_space_id.get.return_value = None
    trainer_for(tmp_path, report_to=tracker).train()
    sent = [call.args[0] for call in service.log.call_args_list]
    logged = [entry for entry in sent if "train/loss" in entry]
    assert len(logged) == 3
    for name in ("gsnr_over_sqrt_n/base/decay", "gsnr_unmeasured", "update_ratio/base/no_decay", "wall_time/record"):
        assert all(f"train/sai/{name}" in entry for entry in logged), name


def test_the_rate_that_is_shown_is_that_of_the_step_and_not_of_the_next(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train()
    shown = [entry["sai/lr/base/decay"] for entry in trainer.state.log_history if "loss" in entry]
    # It falls from 6/6 of the peak to 1/6; the logs are of the steps 2, 4 and 6.
    assert [rate / shown[-1] for rate in shown] == pytest.approx([5, 3, 1])


def test_without_the_callback_trainers_logs_are_as_before(tmp_path):
    trainer = Trainer(tiny_gpt2(), arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    assert not any(key.startswith("sai/") for entry in trainer.state.log_history for key in entry)
    assert not (tmp_path / RECORD_FILE).exists()


def test_accumulation_is_one_step_and_adamw_is_recorded(tmp_path):
    trainer_for(tmp_path, optim="adamw_torch", gradient_accumulation_steps=2).train()
    record = RunRecord.load(tmp_path)
    assert record.timing["steps"] == 6
    assert record.optimizer["name"] == "AdamW"
    assert record.gsnr == {}


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_trainer_run_has_the_whole_history(tmp_path, same_folder):
    trainer_for(tmp_path / "a", save_strategy="steps", save_steps=4).train()
    whole = RunRecord.load(tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert RunRecord.load(checkpoint).run["steps"] == 4
    folder = tmp_path / ("a" if same_folder else "b")
    trainer_for(folder, max_steps=8).train(resume_from_checkpoint=str(checkpoint))
    record = RunRecord.load(folder)
    assert [step for step, _ in record.curve("loss")] == [2, 4, 6, 8]
    assert record.curve("loss")[:2] == whole.curve("loss")[:2]
    assert len(record.run["sessions"]) == (2 if same_folder else 1)


def test_the_hub_token_is_in_no_record(tmp_path):
    trainer_for(tmp_path, hub_token="any-shape-of-token", save_strategy="steps", save_steps=3).train()
    records = list(tmp_path.rglob(RECORD_FILE))
    assert len(records) == 3
    assert not any("any-shape-of-token" in path.read_text() for path in records)


def test_the_record_is_readable_while_training_goes_on(tmp_path):
    seen = []

    class Reader(hf_sai.trainer.callbacks.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(RunRecord.load(tmp_path).run["status"])

    trainer = trainer_for(tmp_path)
    trainer.add_callback(Reader())
    trainer.train()
    assert seen == ["running"] * 6


def test_trainers_own_card_says_how_to_build_the_optimizer(tmp_path):
    trainer = trainer_for(tmp_path, optim_args="momentum=0.8")
    trainer.train()
    trainer.create_model_card()
    line = next(line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("- optimizer:"))
    assert f"SGDSaI of hf-sai {hf_sai.__version__} (arXiv 2412.11768)" in line
    for part in ("momentum=0.8", "lr=0.01", "weight_decay=0.1", "eps=1e-08", "max_grad_norm=1.0"):
        assert part in line
    assert "g-SNR measured for 28 of 28 parameters, median g-SNR/sqrt(n) by group: base/decay " in line


def test_adamws_own_card_line_is_left_alone(tmp_path):
    trainer = Trainer(tiny_gpt2(), arguments(tmp_path, optim="adamw_torch"), train_dataset=ROWS)
    trainer.train()
    trainer.create_model_card()
    assert "betas=(0.9,0.999)" in (tmp_path / "README.md").read_text()


def test_the_optimizer_line_names_rate_ratios():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    line = optimizer_line(hf_sai.create_sgd_sai_optimizer(model, lr=1e-2, lr_ratios={"lora_B": 4.0}))
    assert "lr_ratios={'default/lora_B': 4.0}" in line
    assert "measured for 0 of 4 parameters" in line


def test_a_peft_run_records_adapter_and_base(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    tiny_gpt2().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    trainer_for(tmp_path / "run", model=model).train()
    record = RunRecord.load(tmp_path / "run")
    assert record.model["library"] == "peft"
    assert record.model["base_class"] == "GPT2LMHeadModel"
    assert record.model["adapter"]["peft_type"] == "LORA"
    assert record.model["adapter"]["r"] == 2
    assert [r["group"] for r in record.gsnr["roles"]] == ["default/lora_A", "default/lora_B"]


def test_an_accelerate_loop_without_trainer_writes_the_same_record(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = tiny_gpt2()
    optimizer = hf_sai.SGDSaI(hf_sai.param_groups(model, lr=1e-2, weight_decay=0.1), lr=1e-2, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    tracked = []
    recorder = RunRecorder(tmp_path, budget=1.0, data=[{"name": "counting"}])
    recorder.start(model, optimizer, settings={"learning_rate": 1e-2})
    for step in range(1, 5):
        batch = {key: torch.tensor([row[key] for row in ROWS[:4]]) for key in ROWS[0]}
        with recorder.step():
            loss = model(**batch).loss
            accelerator.backward(loss)
            with recorder.update(measure=step % 2 == 0):
                optimizer.step()
            optimizer.zero_grad()
        if step % 2 == 0:
            tracked.append(recorder.log(step, {"loss": loss.item()}))
    recorder.add(samples=[{"title": "counting", "text": "1 2 3"}])
    recorder.finish({"eval_loss": 1.0})
    record = RunRecord.load(tmp_path)
    assert record.curve("loss") == [(2, tracked[0]["loss"]), (4, tracked[1]["loss"])]
    assert record.curve("sai/update_ratio/base/decay")[0][1] == tracked[0]["sai/update_ratio/base/decay"]
    assert record.gsnr["parameters"][0]["name"] == "transformer.wte.weight"
    assert record.samples[0]["text"] == "1 2 3"
    assert record.run["status"] == "finished"
    elements = sum(p.numel() for p in model.parameters())
    assert record.state_bytes == 4 * elements + 8 * len(record.gsnr["parameters"])


# --- a recorder never ends a training, and tells what was in force


def test_a_callback_that_is_added_to_a_trainer_later_records_as_well(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.add_callback(RunRecordCallback)
    trainer.train()
    record = RunRecord.load(tmp_path)
    assert record.run["status"] == "finished"
    assert [step for step, _ in record.curve("loss")] == [2, 4, 6]


def test_scalars_of_a_callback_that_is_not_ours_are_none_of_our_business(tmp_path):
    class Theirs(TrainerCallback):
        scalars = None

    trainer = trainer_for(tmp_path)
    trainer.add_callback(Theirs())
    trainer.train()
    assert RunRecord.load(tmp_path).run["status"] == "finished"


@pytest.mark.parametrize(
    "broken", ["describe_model", "describe_gsnr", "versions", "short_path", "optimizer_scalars", "meter", "to_json"]
)
def test_what_fails_in_the_recorder_costs_a_warning_and_no_training(tmp_path, monkeypatch, caplog, broken):
    def fail(*args, **kwargs):
        raise RuntimeError("nobody thought of this")

    target = recorder_module.UpdateMeter if broken == "meter" else recorder_module
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(target, "before" if broken == "meter" else broken, fail)
    trainer.train()
    assert trainer.state.global_step == 6
    warnings = [r.message for r in caplog.records if "The run record is incomplete" in r.message]
    assert len(set(warnings)) == len(warnings) == (3 if broken == "to_json" else 1)
    assert "RuntimeError: nobody thought of this" in warnings[0]
    record = RunRecord.load(tmp_path)
    assert record.run["status"] == "finished"
    if broken != "to_json":
        assert [step for step, _ in record.curve("loss")] == [2, 4, 6]


def test_a_home_that_does_not_exist_ends_no_training(tmp_path, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", nobody)
    trainer_for(tmp_path).train()
    assert RunRecord.load(tmp_path).run["status"] == "finished"


@pytest.mark.parametrize("options", [{"logging_strategy": "no"}, {"logging_steps": 1000}])
def test_without_logging_the_record_is_still_of_the_whole_run(tmp_path, options):
    trainer_for(tmp_path, **options).train()
    record = RunRecord.load(tmp_path)
    assert record.run["status"] == "finished"
    assert record.run["steps"] == record.timing["steps"] == 6


def test_a_group_on_two_devices_is_measured():
    from hf_sai.runs.meters import UpdateMeter

    here, there = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4, device="meta"))
    meter = UpdateMeter(torch.optim.SGD([{"params": [here]}], lr=0.1))
    meter._optimizer.param_groups[0]["params"] = [here, torch.nn.Parameter(torch.ones(2))]
    assert len(meters._by_device([here, there, here])) == 2
    meter.before()
    with torch.no_grad():
        here.add_(0.5)
    meter.after()
    assert meter.whole_ratio() == pytest.approx((4 * 0.25 / 6) ** 0.5)


def test_every_trial_of_a_search_has_its_own_record(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    trainer = Trainer(
        None, arguments(tmp_path), train_dataset=ROWS, callbacks=[RunRecordCallback(budget=1.0)],
        model_init=lambda trial: tiny_gpt2(),
    )  # fmt: skip
    for rate in (1e-2, 2e-2):
        trainer.args.learning_rate = rate
        trainer.train(trial={"learning_rate": rate})
    records = [RunRecord.load(tmp_path / f"run-{number}") for number in (0, 1)]
    assert [record.optimizer["options"]["lr"] for record in records] == [1e-2, 2e-2]
    assert [record.run["status"] for record in records] == ["finished"] * 2


def test_given_to_another_trainer_it_leaves_the_first_record_as_it_is(tmp_path):
    callback = RunRecordCallback(budget=1.0)
    first, second = (trainer_for(tmp_path / name, callback) for name in ("first", "second"))
    first.train()
    before = (tmp_path / "first" / RECORD_FILE).read_text()
    second.train()
    assert (tmp_path / "first" / RECORD_FILE).read_text() == before
    for name in ("first", "second"):
        record = RunRecord.load(tmp_path / name)
        assert (record.name, record.run["status"], len(record.curve("loss"))) == (name, "finished", 3)


@pytest.mark.parametrize("data", [["name"], [{"id": "me/data"}], [{"name": 5}]], ids=str)
def test_data_that_no_record_could_hold_is_refused_before_the_training(data):
    with pytest.raises(ValueError, match="data"):
        RunRecordCallback(data=data)


def test_the_batch_size_that_auto_find_came_to_is_recorded(tmp_path):
    class OutOfMemoryAbove2(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    callback = RunRecordCallback(budget=1.0)
    trainer = plain_trainer(tmp_path, cls=OutOfMemoryAbove2, callbacks=[callback], auto_find_batch_size=True)
    trainer.train()
    record = RunRecord.load(tmp_path)
    assert record.settings["per_device_train_batch_size"] == trainer.state.train_batch_size <= 2
    assert [step for step, _ in record.curve("loss")] == [2, 4, 6]


def test_options_that_a_loaded_state_overrules_are_recorded_as_they_are_in_force(tmp_path, caplog):
    trainer_for(tmp_path / "a", save_strategy="steps", save_steps=4, max_steps=4, optim_args="momentum=0.8").train()
    resumed = trainer_for(tmp_path / "b", optim_args="momentum=0.5", learning_rate=2e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    options = RunRecord.load(tmp_path / "b").optimizer["options"]
    assert (options["momentum"], options["lr"], options["weight_decay"]) == (0.8, 1e-2, 0.1)
    assert "momentum=0.8 (asked for: 0.5)" in caplog.text
    assert "momentum=0.8" in optimizer_line(resumed.optimizer.optimizer)


def test_a_missing_record_is_refused_with_the_ways_to_one(tmp_path):
    with pytest.raises(ValueError, match=r"run_record.json: No such.*RunRecordCallback.*hf-sai run --record"):
        RunRecord.load(tmp_path)


def test_frozen_parameters_do_not_count_as_unmeasured():
    model = tiny_gpt2()
    for name, p in model.named_parameters():
        p.requires_grad_("ln_" in name)
    optimizer = hf_sai.SGDSaI(model.named_parameters(), lr=1e-2)
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    assert dict(optimizer_scalars(optimizer))["sai/gsnr_unmeasured"] == 0.0


def test_the_callback_alone_says_what_it_needs():
    with pytest.raises(RuntimeError, match="give it to a Trainer first"):
        RunRecordCallback().add(results={"x": 1})


def test_the_record_and_a_plain_loop_need_no_transformers(tmp_path):
    import subprocess

    code = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'accelerate', 'peft']));"
        "import torch; from hf_sai.runs.recorder import RunRecorder; m = torch.nn.Linear(2, 1);"
        "r = RunRecorder(sys.argv[1]); r.start(m, torch.optim.SGD(m.parameters())); r.finish()"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert json.loads((tmp_path / RECORD_FILE).read_text())["run"]["status"] == "finished"
