"""Publishing: through the real huggingface_hub client to a loopback Hub and back; faults are told, tokens are kept."""

import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from test_model_cards import HOME as MODEL_CARDS
from test_model_cards import load_collect
from trainer_cases import arguments, tiny_gpt2
from transformers import AutoModelForCausalLM, Trainer

from hf_sai.cli.main import main
from hf_sai.publishing.artifacts import finish_run
from hf_sai.publishing.files_to_publish import plan_files
from hf_sai.publishing.publish import PublishError, create_repository, publish
from hf_sai.runs.record import RECORD_FILE, RunRecord
from hf_sai.runs.recorder import RunRecorder
from hf_sai.trainer.callbacks import RunRecordCallback
from hf_sai.trainer.hub_callback import PublishCallback, take_over_push_to_hub


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
        yield server.hub


def download(hub, repo, folder, **more):
    return snapshot_download(repo, local_dir=folder, token=TOKEN, endpoint=constants.ENDPOINT, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "counting"
    model = tiny_gpt2()
    recorder = RunRecorder(folder, data=[{"name": "counting"}])
    recorder.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recorder.finish({"eval_loss": 2.0})
    model.save_pretrained(folder)
    finish_run(folder)
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", ".env", "notes.txt", "my.env", "server.key"):
        (folder / name).write_text("private")
    (folder / "checkpoint-5").mkdir()
    save_file({"x": torch.zeros(2)}, folder / "checkpoint-5" / "model.safetensors")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out").write_text("log")
    os.symlink("/etc/passwd", folder / "vocab.txt")
    return folder


PUBLIC = {"README.md", "config.json", "generation_config.json", "model.safetensors", RECORD_FILE}


def test_only_what_is_on_the_list_is_planned(finished):
    plan = plan_files(finished)
    assert {name for name, _ in plan.files} == PUBLIC
    reasons = dict(plan.left_out)
    assert reasons[".env"] == reasons["my.env"] == reasons["server.key"] == "never uploaded"
    assert reasons["vocab.txt"] == "not a plain file"
    assert "--include" in reasons["optimizer.pt"]
    assert set(reasons) >= {"training_args.bin", "checkpoint-5/model.safetensors", "runs/events.out", "notes.txt"}
    assert plan.total_bytes == sum((finished / name).stat().st_size for name in PUBLIC)


def test_what_is_asked_for_is_added_but_never_secrets(finished):
    plan = plan_files(finished, include=["optimizer.pt", ".env", "*", "checkpoint-5/*"])
    names = {name for name, _ in plan.files}
    assert names == PUBLIC | {
        "optimizer.pt",
        "scheduler.pt",
        "notes.txt",
        "checkpoint-5/model.safetensors",
    }


def test_a_published_run_comes_back_the_same_and_loads(finished, hub, tmp_path):
    url = publish(finished, "tester/counting", private=True)
    assert url.startswith(f"{constants.ENDPOINT}/tester/counting/commit/")
    assert hub.repos["tester/counting"]["private"] is True
    assert len(hub.commits) == 1
    copy = download(hub, "tester/counting", tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(copy)
    original = AutoModelForCausalLM.from_pretrained(finished)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), original.parameters(), strict=True))
    assert RunRecord.load(copy) == RunRecord.load(finished)
    assert set(hub.files("tester/counting")) == PUBLIC | {".gitattributes"}


@pytest.mark.parametrize("change", ["rewritten", "removed"])
def test_a_file_that_changes_after_the_search_for_secrets_is_not_published(
    finished, hub, tmp_path, monkeypatch, change
):
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)

    def create(*args, **options):
        file = folder / "generation_config.json"
        text = file.read_text()
        file.unlink()
        if change == "rewritten":
            file.write_text(" " * len(text))
        return create_repository(*args, **options)

    monkeypatch.setattr("hf_sai.publishing.publish.create_repository", create)
    with pytest.raises(ValueError, match=r"generation_config.json was changed or removed while it was published"):
        publish(folder, "tester/counting")
    assert hub.commits == []


def test_publishing_again_updates_and_a_revision_is_a_branch(finished, hub):
    publish(finished, "counting", revision="v2")
    publish(finished, "counting", revision="v2", message="again")
    assert hub.commits[0][:3] == ("tester/counting", "v2", "Publish a run of hf-sai")
    assert set(hub.files("tester/counting")) == {".gitattributes"}
    assert set(hub.files("tester/counting", "v2")) > PUBLIC


def test_the_published_card_loads_from_the_hub_and_the_local_one_stays(finished, hub, tmp_path):
    local = (finished / "README.md").read_text()
    publish(finished, "counting")
    card = hub.files("tester/counting")["README.md"].decode()
    assert "AutoModelForCausalLM.from_pretrained('tester/counting')" in card
    assert local != card == local.replace("'counting'", "'tester/counting'")
    assert (finished / "README.md").read_text() == local
    publish(finished, "counting", revision="v2")
    card = hub.files("tester/counting", "v2")["README.md"].decode()
    assert "from_pretrained('tester/counting', revision='v2')" in card
    copy = shutil.copytree(download(hub, "tester/counting", tmp_path / "copy", revision="v2"), tmp_path / "again")
    publish(copy, "again")
    assert b"from_pretrained('tester/again')" in hub.files("tester/again")["README.md"]
    own = local.replace("do_sample=True", "do_sample=False")
    (copy / "README.md").write_text(own)
    publish(copy, "again")
    assert hub.files("tester/again")["README.md"].decode() == own


def test_a_pipelines_parts_are_those_in_its_index(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "X", "text_encoder_3": ["a", "B"], "../up": ["a", "B"]}'
    )
    for folder in ("text_encoder_3", "private"):
        (tmp_path / folder).mkdir()
        save_file({"x": torch.zeros(2)}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "notes.txt").write_text("x")
    plan = plan_files(tmp_path)
    assert [name for name, _ in plan.files] == ["model_index.json", "text_encoder_3/model.safetensors"]
    (tmp_path / "model_index.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is not the index of a diffusers pipeline"):
        plan_files(tmp_path)


def test_adapters_and_pipelines_come_back_too(hub, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = get_peft_model(
        tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "lora")
    publish(tmp_path / "lora", "lora")
    back = PeftModel.from_pretrained(tiny_gpt2(), download(hub, "tester/lora", tmp_path / "lora_copy"))
    inputs = torch.tensor([[1, 2, 3]])
    assert torch.equal(back.eval()(inputs).logits, lora.eval()(inputs).logits)

    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    size = {"sample_size": 4, "block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2}
    unet = diffusers.UNet2DModel(**size, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    publish(tmp_path / "pipeline", "pipeline")
    copy = download(hub, "tester/pipeline", tmp_path / "pipeline_copy")
    loaded = diffusers.DDPMPipeline.from_pretrained(copy)
    assert torch.equal(loaded.unet.conv_in.weight, unet.conv_in.weight)


def test_the_command_is_a_dry_run_unless_told_otherwise(finished, hub, capsys):
    assert main(["publish", str(finished), "tester/counting"]) == 0
    out = capsys.readouterr().out
    assert "Dry run: 5 files" in out
    for name in PUBLIC:
        assert f"  {name}\n" in out
    assert "left out   .env (never uploaded)" in out
    assert hub.requests == []
    assert main(["publish", str(finished), "tester/counting", "--yes", "--revision", "v1"]) == 0
    assert "published, private: http://127.0.0.1" in capsys.readouterr().out
    assert set(hub.files("tester/counting", "v1")) > PUBLIC


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lambda hub: hub.status_at.update(preupload=500), "the Hub failed (500)"),
        (lambda hub: setattr(hub, "die_at", "create"), "broke off"),
        (lambda hub: setattr(hub, "die_at", "preupload"), "broke off"),
        (lambda hub: setattr(hub, "die_at", "lfs_put"), "broke off"),
        (lambda hub: setattr(hub, "die_at", "commit"), "broke off"),
        (lambda hub: hub.status_at.update(commit=413), "refused to publish tester/counting (413"),
    ],
    ids=["server_error", "gone_at_once", "gone_before_upload", "gone_mid_upload", "gone_at_commit", "too_large"],
)
def test_after_a_fault_nothing_is_half_there_and_a_second_try_completes(finished, hub, capsys, fault, sentence):
    before = snapshot(finished)
    fault(hub)
    assert main(["publish", str(finished), "tester/counting", "--yes"]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "publish again" in error
    assert hub.commits == []
    assert snapshot(finished) == before
    hub.die_at = None
    hub.status_at.clear()
    assert main(["publish", str(finished), "tester/counting", "--yes"]) == 0
    assert set(hub.files("tester/counting")) > PUBLIC


@pytest.mark.parametrize("name", ["a/b/c", "spaces are wrong", "-x", "x..y", "", "x" * 97])
def test_an_impossible_name_is_refused_before_anything_is_sent(finished, hub, capsys, name):
    for told in ([], ["--yes"]):
        assert main(["publish", str(finished), *told, "--", name]) == 1
        assert "cannot be the name of a repository" in capsys.readouterr().err
    assert hub.requests == []


def test_a_wrong_a_weak_and_a_missing_token_are_told_apart(finished, hub, capsys, monkeypatch):
    assert main(["publish", str(finished), "forbidden/x", "--yes"]) == 1
    assert "may not write to forbidden/x (403" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_WrongTokenThatNobodyKnows0000001")
    assert main(["publish", str(finished), "tester/x", "--yes"]) == 1
    assert "does not know the access token (401)" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("hf_sai.publishing.publish.get_token", lambda: None)
    assert main(["publish", str(finished), "tester/x", "--yes"]) == 1
    assert "no access token: run `hf auth login`" in capsys.readouterr().err


def test_a_repository_with_something_else_in_it_is_not_overwritten(finished, hub, capsys):
    hub.repos["tester/other"] = {"private": True, "branches": {"main": {"pytorch_model.bin": b"precious"}}}
    assert main(["publish", str(finished), "tester/other", "--yes"]) == 1
    assert "tester/other exists and holds no run of hf-sai" in capsys.readouterr().err
    assert hub.files("tester/other") == {"pytorch_model.bin": b"precious"}
    assert main(["publish", str(finished), "tester/other", "--yes", "--update"]) == 0
    assert set(hub.files("tester/other")) >= PUBLIC | {"pytorch_model.bin"}


def test_what_make_model_cards_leaves_is_published_as_it_is(finished, hub, tmp_path, monkeypatch, capsys):
    """A base and a LoRA of it, both from a folder of model_cards/, and loaded from the Hub again."""
    collect = load_collect()
    monkeypatch.setattr(collect, "HERE", tmp_path / "cards")
    (tmp_path / "cards").mkdir()
    shutil.copyfile(MODEL_CARDS / "README.md", tmp_path / "cards" / "README.md")
    adapter = tmp_path / "lora"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(finished), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    model.peft_config["default"].base_model_name_or_path = "tester/counting"
    recorder = RunRecorder(adapter)
    recorder.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recorder.finish()
    model.save_pretrained(adapter)
    collect.main([str(finished), str(adapter)])
    for name in ("counting", "lora"):
        assert main(["publish", str(tmp_path / "cards" / name), f"tester/{name}", "--yes"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert set(hub.files("tester/counting")) == PUBLIC | {".gitattributes"}
    base = download(hub, "tester/counting", tmp_path / "base")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), download(hub, "tester/lora", tmp_path / "adapter")
    )
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_what_stays_out_is_named_when_it_is_published(finished, hub, caplog):
    publish(finished, "tester/counting")
    assert f"{finished}: left out of the upload: " in caplog.text
    assert "notes.txt" in caplog.text
    assert "optimizer.pt" not in caplog.text


def test_a_directory_without_weights_is_refused(tmp_path, capsys):
    assert main(["publish", str(tmp_path), "x"]) == 1
    assert "holds no weights" in capsys.readouterr().err
    assert main(["publish", str(tmp_path / "nowhere"), "x"]) == 1
    assert "is not a directory" in capsys.readouterr().err


def test_where_only_checkpoints_have_weights_the_newest_is_named(tmp_path, capsys):
    for number, step in enumerate((20, 100)):
        file = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(b"x")
        os.utime(file, (number, number))
    assert main(["publish", str(tmp_path), "x"]) == 1
    assert f"`hf-sai card {tmp_path / 'checkpoint-100'}`, and publish that" in capsys.readouterr().err


def test_what_others_would_miss_is_told_before_and_after(hub, tmp_path, capsys):
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    recorder = RunRecorder(tmp_path)
    recorder.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recorder.finish()
    model.save_pretrained(tmp_path)  # with PEFT's card, an empty form
    assert main(["publish", str(tmp_path), "tester/lora"]) == 0
    assert f"missing    the card says nothing of this run: `hf-sai card {tmp_path}`" in capsys.readouterr().out
    finish_run(tmp_path)
    assert main(["publish", str(tmp_path), "tester/lora", "--yes"]) == 0
    told = capsys.readouterr().out
    assert "says nothing" not in told
    assert "missing    the card's code loads a tokenizer" in told
    assert "missing    the base model lies only on this machine" in told


def test_nothing_is_missing_from_a_whole_run(finished, tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(finished, whole, symlinks=True)
    (whole / "tokenizer.json").write_text("{}")
    assert main(["publish", str(whole), "tester/whole"]) == 0
    assert "missing" not in capsys.readouterr().out


def test_a_file_with_a_token_in_it_is_not_published(finished, hub, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    for name, secret in (("README.md", "hf_" + "a1B2" * 8), ("optimizer.pt", TOKEN)):
        kept = (run / name).read_text()
        (run / name).write_text(kept + secret)
        with pytest.raises(ValueError, match=rf"{name} \(.*\) holds an access token") as caught:
            publish(run, "tester/run", include=["optimizer.pt"])
        assert secret not in str(caught.value)
        (run / name).write_text(kept)
    assert hub.commits == []


def test_a_message_with_a_token_is_not_sent(finished, hub, capsys):
    secret = "hf_" + "a1B2" * 8
    assert main(["publish", str(finished), "tester/run", "--yes", "--message", f"with {secret}"]) == 1
    said = capsys.readouterr().err
    assert "message holds what looks like a secret" in said
    assert secret not in said
    assert hub.requests == []


def test_no_token_reaches_a_log_or_an_exception(finished, hub, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", "unused-other-token")
    planted = "any-shape-Of_Token.0123456789"
    for fault in ("none", "die", 403, 500):
        hub.die_at = "preupload" if fault == "die" else None
        hub.status_at = {"create": fault} if isinstance(fault, int) else {}
        try:
            publish(finished, "tester/counting", token=planted if fault != "die" else TOKEN)
            raise AssertionError("must fail")
        except PublishError as error:
            shown = "".join(traceback.format_exception(error)) + str(error.__cause__) + repr(error.args)
        for token in (planted, TOKEN, "unused-other-token"):
            assert token not in shown
    text = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records)
    for token in (planted, TOKEN, "unused-other-token"):
        assert token not in text


def trained_with(folder, **more):
    args = arguments(folder, push_to_hub=True, hub_model_id="tester/pushed", hub_token=TOKEN, **more)
    callback = take_over_push_to_hub(args)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16
    trainer = Trainer(tiny_gpt2(), args, train_dataset=rows, callbacks=[RunRecordCallback(), callback])
    trainer.train()
    trainer.save_model()
    finish_run(folder)
    return callback


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_push_to_hub_follows_the_strategy_with_our_card_and_list(hub, tmp_path, strategy, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    callback = trained_with(
        tmp_path / "run",
        hub_strategy=strategy,
        hub_private_repo=True,
        save_strategy="steps",
        save_steps=3,
        hub_always_push=True,
    )
    assert isinstance(callback, PublishCallback)
    callback.finish()
    files = hub.files("tester/pushed")
    assert b"<!-- hf-sai:training -->" in files["README.md"]
    assert hub.repos["tester/pushed"]["private"] is True
    messages = [commit[2] for commit in hub.commits]
    assert messages[-1] == "End of training"
    assert ("Training in progress, step 3" in messages) == (strategy != "end")
    resume = sorted(name for name in files if name.endswith("optimizer.pt"))
    assert resume == {
        "checkpoint": ["last-checkpoint/optimizer.pt"],
        "all_checkpoints": ["checkpoint-3/optimizer.pt", "checkpoint-6/optimizer.pt"],
    }.get(strategy, [])
    assert not any(name.endswith("training_args.bin") for name in files)
    assert not any(TOKEN.encode() in content for content in files.values())
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)  # not even in training_args.bin


def test_without_push_to_hub_there_is_no_callback(tmp_path, hub):
    assert take_over_push_to_hub(arguments(tmp_path)) is None
    assert hub.requests == []


def test_a_wrong_token_fails_before_the_training(tmp_path, hub):
    with pytest.raises(PublishError, match="does not know the access token"):
        take_over_push_to_hub(arguments(tmp_path, push_to_hub=True, hub_token="hf_WrongToken00000000000001"))


def test_a_lost_connection_during_training_costs_a_warning_and_the_end_publishes_all(hub, tmp_path, caplog):
    hub.die_at = "commit"
    with caplog.at_level(logging.WARNING, "hf_sai"):
        callback = trained_with(tmp_path / "run", hub_strategy="every_save", save_strategy="steps", save_steps=3)
        with pytest.raises(PublishError, match="publish again"):
            callback.finish()
    assert "A checkpoint was not published" in caplog.text
    hub.die_at = None
    callback.finish()
    assert "model.safetensors" in hub.files("tester/pushed")


TESTS = [Path(__file__).parents[1], Path(__file__).parents[1] / "trainer"]
WHOLE_WAY = """
import sys
from transformers import AutoModelForCausalLM, Trainer
from safetensors.torch import save_file
from trainer_cases import arguments, tiny_gpt2
from hf_sai.cli.main import main

assert main(["publish", sys.argv[1], "counting", "--yes"]) == 0
print(AutoModelForCausalLM.from_pretrained("tester/counting").num_parameters())
args = arguments(sys.argv[2], push_to_hub=True, hub_model_id="tester/own")
trainer = Trainer(tiny_gpt2(), args, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 16)
trainer.train()
trainer.push_to_hub()
"""


def run_with(server, command, home):
    """Run a command in a process of its own for which the server is the Hub."""
    place = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([*map(str, TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_the_whole_way_in_a_process_of_its_own_and_trainers_own_push(finished, tmp_path):
    with HubServer() as server:
        done = run_with(server, [sys.executable, "-c", WHOLE_WAY, finished, tmp_path / "own"], tmp_path / "hf")
    assert str(tiny_gpt2().num_parameters()) in done.stdout.split()
    assert TOKEN not in done.stdout + done.stderr
    assert json.loads(server.hub.files("tester/counting")[RECORD_FILE])["format"] == "hf-sai run record"
    assert b"- optimizer: SGDSaI of hf-sai" in server.hub.files("tester/own")["README.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ("gpt2_pretraining", "model.safetensors"),
        ("llama_lora", "adapter_model.safetensors"),
        ("vit_classification", "model.safetensors"),
    ],
)
def test_a_recipe_publishes_its_run(recipe, weights, tmp_path):
    folder = Path(__file__).parents[2] / "recipes" / recipe
    command = [sys.executable, folder / "train.py", folder / "smoke.yaml", "--output_dir", tmp_path / "run"]
    command += ["--max_steps", "2", "--save_steps", "1", "--eval_strategy", "no", "--report_to", "none"]
    command += ["--push_to_hub", "true", "--hub_model_id", "tester/made", "--hub_private_repo", "true"]
    command += ["--hub_revision", "v1", "--hub_strategy", "every_save"]
    with HubServer() as server:
        done = run_with(server, list(map(str, command)), tmp_path / "hf")
    files = server.hub.files("tester/made", "v1")
    assert {"README.md", RECORD_FILE, "pictures/gsnr.png", weights} <= set(files)
    assert b"'tester/made', revision='v1')" in files["README.md"]
    assert server.hub.commits[0][2] == "Training in progress, step 1"
    assert server.hub.repos["tester/made"]["private"] is True
    assert not any(name.endswith((".pt", ".bin")) for name in files)
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*files.values(), *written])
    assert TOKEN not in done.stdout + done.stderr


def test_a_new_repository_is_private_unless_public_is_said(finished, hub, capsys):
    assert main(["publish", str(finished), "tester/mine"]) == 0
    assert "as a private repository" in capsys.readouterr().out
    assert main(["publish", str(finished), "tester/mine", "--yes"]) == 0
    assert "published, private: " in capsys.readouterr().out
    assert hub.repos["tester/mine"]["private"] is True
    assert main(["publish", str(finished), "tester/open", "--public"]) == 0
    assert "for everybody to see" in capsys.readouterr().out
    assert main(["publish", str(finished), "tester/open", "--public", "--yes"]) == 0
    assert "published, public: " in capsys.readouterr().out
    assert hub.repos["tester/open"]["private"] is False
    publish(finished, "tester/by_hand")
    assert hub.repos["tester/by_hand"]["private"] is True


def test_a_private_repository_stays_so_and_the_command_says_it(finished, hub, capsys):
    publish(finished, "tester/mine")
    assert main(["publish", str(finished), "tester/mine", "--yes", "--public"]) == 0
    assert "\nprivate    as the repository was before" in capsys.readouterr().out
    assert hub.repos["tester/mine"]["private"] is True


def test_a_public_repository_is_committed_to_only_if_public_is_said(finished, hub, capsys):
    publish(finished, "tester/open", private=False)
    assert main(["publish", str(finished), "tester/open", "--yes"]) == 1
    assert "tester/open is public: say so" in capsys.readouterr().err
    assert len(hub.commits) == 1
    assert main(["publish", str(finished), "tester/open", "--yes", "--public"]) == 0
    assert len(hub.commits) == 2


@pytest.mark.parametrize(("asked", "private"), [(None, True), (True, True), (False, False)])
def test_trainers_push_is_private_unless_public_is_said(hub, tmp_path, asked, private):
    take_over_push_to_hub(arguments(tmp_path, push_to_hub=True, hub_model_id="tester/p", hub_private_repo=asked))
    assert hub.repos["tester/p"]["private"] is private


def test_a_card_that_a_person_wrote_is_not_replaced_unasked(finished, hub, capsys):
    own = b"---\nlicense: mit\n---\n# Mine\n\nThese words took me a day.\n"
    hub.repos["tester/mine"] = {"private": True, "branches": {"main": {".gitattributes": b"*", "README.md": own}}}
    assert main(["publish", str(finished), "tester/mine", "--yes"]) == 1
    assert "holds words of a person" in capsys.readouterr().err
    assert hub.files("tester/mine")["README.md"] == own
    with pytest.raises(PublishError, match="words of a person"):
        take_over_push_to_hub(arguments(finished, push_to_hub=True, hub_model_id="tester/mine"))
    assert main(["publish", str(finished), "tester/mine", "--yes", "--update"]) == 0
    assert b"hf-sai:training" in hub.files("tester/mine")["README.md"]


def test_words_that_a_person_added_on_the_hub_are_not_lost(finished, hub, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    publish(run, "tester/mine")
    publish(run, "tester/mine")  # what the tool wrote itself is no person's
    files = hub.files("tester/mine")
    files["README.md"] = files["README.md"].replace(b"## Limits\n", b"## Limits\n\nAsk my cat.\n")
    with pytest.raises(PublishError, match="words of a person"):
        publish(run, "tester/mine")
    card = run / "README.md"
    card.write_text(card.read_text().replace("## Limits\n", "## Limits\n\nAsk my cat.\n"))
    publish(run, "tester/mine")
    assert b"Ask my cat." in hub.files("tester/mine")["README.md"]


def test_a_card_without_text_is_no_persons(finished, hub):
    hub.repos["tester/new"] = {"private": True, "branches": {"main": {"README.md": b"---\nlicense: mit\n---\n"}}}
    publish(finished, "tester/new")
    assert b"hf-sai:training" in hub.files("tester/new")["README.md"]


def test_no_path_of_the_machine_is_published(hub, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "SOMEBODY" / "private-base"
    tiny_gpt2().save_pretrained(base)
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    run = tmp_path / "run"
    recorder = RunRecorder(run, data=[{"name": str(base), "id": str(base)}], card={"base_model": str(base)})
    recorder.start(lora, torch.optim.SGD(lora.parameters(), lr=0.1), settings={"train_file": f"file://{base}/x.txt"})
    recorder.finish()
    lora.save_pretrained(run)
    (run / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(base), "x": [1.5]}))
    (run / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(base), "eos_token": "</s>"}))
    finish_run(run)
    local = (run / "adapter_config.json").read_text()
    publish(run, "tester/lora", include=["trainer_state.json"])
    for name, content in hub.files("tester/lora").items():
        assert b"SOMEBODY" not in content, name
    files = hub.files("tester/lora")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert json.loads(files["adapter_config.json"])["r"] == 8
    assert json.loads(files["trainer_state.json"]) == {"best_model_checkpoint": None, "x": [1.5]}
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    assert (run / "adapter_config.json").read_text() == local


def test_an_adapter_with_a_name_of_its_own_is_carded_published_and_loaded_by_the_cards_code(hub, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from test_cards import python_code, tokenizer

    base, run = tmp_path / "base", tmp_path / "run"
    tiny_gpt2().save_pretrained(base)
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name="style")
    recorder = RunRecorder(run)
    recorder.start(lora, torch.optim.SGD(lora.parameters(), lr=0.1))
    recorder.finish()
    lora.save_pretrained(run)
    tokenizer().save_pretrained(run)
    assert main(["card", str(run), "--repo-id", str(run)]) == 0
    capsys.readouterr()
    code = python_code((run / "README.md").read_text())
    assert "subfolder='style'" in code
    exec(code, {})
    assert capsys.readouterr().out.startswith("Return the")
    publish(run, "tester/style")
    files = hub.files("tester/style")
    assert {"style/adapter_config.json", "style/adapter_model.safetensors", "README.md"} <= set(files)
    assert "PeftModel.from_pretrained(base, 'tester/style', subfolder='style')" in files["README.md"].decode()
