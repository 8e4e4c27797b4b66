"""The callback: a record of any Trainer run, scalars in report_to, resume without loss, and loops without Trainer."""

import json
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch
from trainer_cases import ROWS, arguments, tiny_gpt2, trainer_for
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import hf_sai
from hf_sai.runs.describe import optimizer_line
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
            "unmeasured",
            "overhead",
            "optimizer_share",
            *(f"{k}/base/{g}" for k in ("lr", "update_ratio") for g in ("decay", "no_decay")),
        )
    }
    assert expected <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/sai/update_ratio/base/decay")] == [2, 4, 6]
    assert "sai/unmeasured" in trainer.state.log_history[0]


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
    for name in ("unmeasured", "lr/base/decay", "update_ratio/base/no_decay", "optimizer_share"):
        assert all(f"train/sai/{name}" in entry for entry in logged), name


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
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    line = optimizer_line(hf_sai.create_sgd_sai_optimizer(model, lr=1e-2, lr_ratios={"lora_B": 4.0}))
    assert "lr_ratios={'default/lora_B': 4.0}" in line
    assert "measured for 0 of 4 parameters" in line


def test_a_peft_run_records_adapter_and_base(tmp_path):
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
