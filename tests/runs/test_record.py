"""The run record: written whole, without secrets, within its budget, from any training loop; strangers' are refused."""

import contextlib
import copy
import errno
import itertools
import json
import logging
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import hf_sai.runs.recorder as recorder_module
from hf_sai import SGDSaI, param_groups
from hf_sai.runs.environment import command_line, short_path
from hf_sai.runs.files import atomic_write
from hf_sai.runs.meters import SAMPLE, Stopwatch, UpdateMeter, group_names, state_bytes
from hf_sai.runs.record import RECORD_FILE, RECORD_VERSION, RunRecord
from hf_sai.runs.recorder import RunRecorder
from hf_sai.runs.redact import redact, redact_text

TOKEN = "hf_PlantedTokenThatMustNotLeak01"


def small_model(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 1))


def optimizer_of(model, **options):
    return SGDSaI(param_groups(model, lr=1e-2, weight_decay=0.1), lr=1e-2, weight_decay=0.1, **options)


def train(recorder, model, optimizer, steps, first=1, logs=1):
    for step in range(first, first + steps):
        with recorder.step():
            loss = model(torch.ones(3, 4)).square().mean()
            loss.backward()
            with recorder.update(measure=step % logs == 0):
                optimizer.step()
            optimizer.zero_grad()
        if step % logs == 0:
            recorder.log(step, {"loss": loss.item()})


def finished_run(folder, **options):
    model = small_model()
    optimizer = optimizer_of(model)
    recorder = RunRecorder(folder, budget=1.0, data=[{"name": "ones", "license": "cc0-1.0"}], **options)
    recorder.start(model, optimizer, settings={"lr": 1e-2})
    train(recorder, model, optimizer, 4)
    recorder.finish({"eval_loss": 0.5})
    return RunRecord.load(folder)


def test_a_plain_loop_leaves_a_complete_record(tmp_path):
    record = finished_run(tmp_path / "my run")
    assert record.name == "my run"
    assert record.run["status"] == "finished"
    assert record.run["steps"] == 4
    assert record.run["sessions"][0]["command"].startswith("python ")
    assert record.versions["torch"] == torch.__version__
    assert "hf-sai" in record.versions
    assert record.hardware["processes"] == 1
    assert record.hardware["cpus"] == os.cpu_count()
    assert record.model == {"class": "Sequential", "parameters": 37, "trainable": 37, "library": "torch"}
    assert record.optimizer["name"] == "SGDSaI"
    assert record.optimizer["options"]["momentum"] == 0.9
    assert [(g["name"], g["tensors"], g["elements"], g["weight_decay"]) for g in record.optimizer["groups"]] == [
        ("base/decay", 2, 30, 0.1),
        ("base/no_decay", 2, 7, 0.0),
    ]
    assert record.state_bytes == 37 * 4 + 4 * 8  # one float32 buffer, one g-SNR per tensor
    assert [p["name"] for p in record.gsnr["parameters"]] == ["0.weight", "2.weight", "0.bias", "2.bias"]
    assert [(r["group"], r["measured"]) for r in record.gsnr["roles"]] == [("base/decay", 2), ("base/no_decay", 2)]
    assert 0 < record.optimizer_share < 1
    assert record.overhead == record.timing["record_seconds"] / record.timing["step_seconds"]
    assert record.timing["steps"] == 4
    assert [step for step, _ in record.curve("loss")] == [1, 2, 3, 4]
    assert record.data == [{"name": "ones", "license": "cc0-1.0"}]
    assert record.results == {"eval_loss": 0.5}


def test_the_file_has_a_version_and_no_nan(tmp_path):
    recorder = RunRecorder(tmp_path)
    recorder.start(
        model := small_model(), optimizer_of(model), settings={"odd": {"b", "c", "a"}, "t": torch.tensor(2.5)}
    )
    recorder.append(1, {"loss": float("nan")})
    recorder.finish()
    content = json.loads((tmp_path / RECORD_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["format"] == "hf-sai run record"
    assert content["version"] == RECORD_VERSION
    assert content["history"] == [{"loss": None, "step": 1}]
    assert content["settings"] == {"odd": ["a", "b", "c"], "t": 2.5}
    assert RunRecord.load(tmp_path).curve("loss") == []


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    recorder = RunRecorder(tmp_path / "run")
    model = small_model()
    recorder.start(model, optimizer := optimizer_of(model))
    train(recorder, model, optimizer, 2)
    assert recorder.scalars() == {}
    assert recorder.log(3, {"loss": 1.0}) == {"loss": 1.0}
    recorder.finish()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_history_up_to_the_checkpoint(tmp_path):
    model = small_model()
    optimizer = optimizer_of(model)
    recorder = RunRecorder(tmp_path, budget=1.0, data=[{"name": "ones"}])
    recorder.append(0, {"eval_loss": 9.0})  # evaluated before training
    recorder.start(model, optimizer)
    train(recorder, model, optimizer, 4)
    recorder.save()
    first = RunRecord.load(tmp_path)

    again = RunRecorder(tmp_path, budget=1.0)  # a new process, from the checkpoint of step 2
    again.append(0, {"eval_loss": 9.0})
    again.start(model, optimizer, step=2)
    train(again, model, optimizer, 3, first=3)
    again.finish()
    record = RunRecord.load(tmp_path)
    assert [step for step, _ in record.curve("loss")] == [1, 2, 3, 4, 5]
    assert record.curve("loss")[:2] == first.curve("loss")[:2]
    assert record.curve("eval_loss") == [(0, 9.0)]
    assert record.run["created"] == first.run["created"]
    assert record.data == first.data
    assert [session["from_step"] for session in record.run["sessions"]] == [0, 2]
    assert record.timing["step_seconds"] > 0.5 * first.timing["step_seconds"]  # two of its four steps remain
    assert record.timing["steps"] == record.run["steps"] == 5


def test_a_new_run_in_the_same_process_starts_a_new_history(tmp_path):
    model = small_model()
    recorder = RunRecorder(tmp_path, budget=1.0)
    for _ in range(2):
        recorder.start(model, optimizer := optimizer_of(model))
        train(recorder, model, optimizer, 2)
        recorder.finish()
    record = RunRecord.load(tmp_path)
    assert [step for step, _ in record.curve("loss")] == [1, 2]
    assert len(record.run["sessions"]) == 1


def test_a_reader_during_the_run_never_sees_half_a_record(tmp_path):
    recorder = RunRecorder(tmp_path, budget=1.0)
    model = small_model()
    recorder.start(model, optimizer := optimizer_of(model))
    stop, problems, reads = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                reads.append(len(RunRecord.load(tmp_path).history))
            except ValueError as error:
                problems.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    train(recorder, model, optimizer, 60)
    for _ in range(20):
        recorder.save()
    stop.set()
    thread.join()
    assert problems == []
    assert max(reads) > 1


def test_what_would_exceed_the_budget_is_left_out(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    recorder = RunRecorder(tmp_path, budget=0.01)
    model = small_model()
    recorder.start(model, optimizer := optimizer_of(model))
    monkeypatch.setattr(recorder._meter, "before", lambda: clock.__setitem__(0, clock[0] + 0.05))
    recorder._measure_cost, recorder._save_cost = 0.05, math.inf
    measured = []
    for step in range(1, 101):
        with recorder.step():
            clock[0] += 0.95
            before = clock[0]
            with recorder.update(measure=True):
                pass
            measured.append(clock[0] > before)
        recorder.append(step, {"loss": 1.0})
    overhead = recorder._spent / recorder._step_watch.seconds()
    assert 5 <= sum(measured) <= 20
    assert overhead <= 0.01
    assert optimizer.state == {}


def test_scalars_name_each_role_and_the_unmeasured(tmp_path):
    model = small_model()
    optimizer = optimizer_of(model, momentum=0.0)
    recorder = RunRecorder(tmp_path, budget=1.0)
    recorder.start(model, optimizer)
    assert recorder.scalars()["sai/gsnr_unmeasured"] == 4
    weights = [p.detach().clone() for p in model.parameters()]
    with recorder.step():
        model(torch.ones(3, 4)).square().mean().backward()
        with recorder.update(measure=True):
            optimizer.step()
    scalars = recorder.scalars()
    assert [*scalars] == sorted(scalars)  # as dashboards show them: g-SNR, rates, updates, time
    assert scalars["sai/gsnr_unmeasured"] == 0
    assert scalars["sai/wall_time/record"] > 0
    assert scalars["sai/wall_time/optimizer"] == recorder._update_watch.seconds() / recorder._step_watch.seconds()
    for group in ("base/decay", "base/no_decay"):
        params = next(g["params"] for g in optimizer.param_groups if g["name"] == group)
        pairs = [
            (w, p.detach()) for w, p in zip(weights, model.parameters(), strict=True) if any(p is q for q in params)
        ]
        expected = (
            torch.cat([(p - w).flatten() for w, p in pairs]).norm() / torch.cat([w.flatten() for w, _ in pairs]).norm()
        )
        assert scalars[f"sai/update_ratio/{group}"] == pytest.approx(expected.item(), rel=1e-5)
        mean = sum(optimizer.state[p]["gsnr"] * p.numel() for p in params) / sum(p.numel() for p in params)
        assert scalars[f"sai/lr/{group}"] == pytest.approx(1e-2 * mean)
        ratios = [row.ratio for row in optimizer.gsnr_report() if row.group == group]
        assert scalars[f"sai/gsnr_over_sqrt_n/{group}"] == pytest.approx(statistics.median(ratios))
    assert "sai/update_ratio/base/decay" not in recorder.scalars()  # each measurement is told once


def test_normalised_scales_give_the_normalised_rate(tmp_path):
    model = nn.Linear(3, 1, bias=False)
    recorder = RunRecorder(tmp_path)
    optimizer = optimizer_of(model, normalize=True)
    recorder.start(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert recorder.scalars()["sai/lr/base/decay"] == pytest.approx(1e-2)


def test_adamw_has_a_record_too(tmp_path):
    model = small_model()
    recorder = RunRecorder(tmp_path, budget=1.0)
    recorder.start(model, optimizer := torch.optim.AdamW(model.parameters(), lr=1e-3))
    train(recorder, model, optimizer, 2)
    recorder.finish()
    record = RunRecord.load(tmp_path)
    assert record.optimizer["class"].startswith("torch.optim.")
    assert record.gsnr == {}
    assert record.state_bytes == 37 * 8 + 4 * 4  # two buffers, a float32 step count per tensor
    assert record.curve("sai/lr/group 0") == [(1, 1e-3), (2, 1e-3)]
    assert record.curve("sai/update_ratio/group 0")


def test_sampled_ratios_of_large_tensors_are_close():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(300, 700))
    assert weight.numel() > 10 * SAMPLE
    optimizer = torch.optim.SGD([weight], lr=0.1)
    meter = UpdateMeter(optimizer)
    weight.grad = torch.randn_like(weight)
    before = weight.detach().clone()
    meter.before()
    optimizer.step()
    meter.after()
    exact = ((weight.detach() - before).norm() / before.norm()).item()
    assert meter.ratios()["group 0"] == pytest.approx(exact, rel=0.05)


def test_weights_that_are_all_zero_have_no_ratio():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    meter = UpdateMeter(optimizer)
    weight.grad = torch.ones(3)
    meter.before()
    optimizer.step()
    meter.after()
    assert meter.ratios() == {}
    assert meter.ratios() is None


def test_state_bytes_counts_what_wrappers_and_shared_storage_hold():
    from accelerate import Accelerator

    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    weight.grad = torch.ones(10)
    optimizer.step()
    optimizer.state[weight]["view"] = optimizer.state[weight]["momentum_buffer"][:5]
    assert state_bytes(Accelerator(cpu=True).prepare(optimizer)) == 40
    assert group_names(optimizer) == ["group 0"]


def test_a_full_disk_leaves_the_old_record_and_costs_one_warning(tmp_path, monkeypatch, caplog):
    recorder = RunRecorder(tmp_path, budget=1.0)
    model = small_model()
    recorder.start(model, optimizer := optimizer_of(model))
    old = (tmp_path / RECORD_FILE).read_text()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "hf_sai"):
        patch.setattr(os, "fsync", full)
        train(recorder, model, optimizer, 3)
    assert (tmp_path / RECORD_FILE).read_text() == old
    assert os.listdir(tmp_path) == [RECORD_FILE]
    assert [r.message.count("No space left on device") for r in caplog.records] == [1]
    recorder.finish()  # there is room again
    assert RunRecord.load(tmp_path).run["steps"] == 3


def test_a_file_that_meets_a_real_size_limit_is_left_whole(tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    (tmp_path / "f.txt").write_text("old")
    code = "import sys; from hf_sai.runs.files import atomic_write; atomic_write(sys.argv[1], 'x' * 5000)"
    blocked = "import sys; sys.modules['transformers'] = None; " + code  # imports the package faster
    done = subprocess.run(
        [sys.executable, "-c", blocked, tmp_path / "f.txt"], preexec_fn=limited, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "what was there before is unchanged" in done.stderr
    assert (tmp_path / "f.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_no_token_gets_into_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "odd-shaped-but-secret")
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train.py", "--hub_token", TOKEN, "--wandb-api-key=k1"])
    settings = {"hub_token": "short", "note": f"with {TOKEN}", "env": ["odd-shaped-but-secret", "given-by-hand"]}
    recorder = RunRecorder(tmp_path, secrets=["given-by-hand"])
    recorder.start(model := small_model(), optimizer_of(model), settings=settings)
    recorder.finish()
    text = (tmp_path / RECORD_FILE).read_text()
    for secret in (TOKEN, "odd-shaped-but-secret", "given-by-hand", "short", "=k1"):
        assert secret not in text
    assert "python train.py --hub_token <redacted> --wandb-api-key=<redacted>" in text


def test_what_only_sounds_like_a_secret_stays():
    settings = {"num_tokens": 5, "tokenizer_name": "gpt2", "include_num_input_tokens_seen": "no", "eos_token_id": 2}
    assert redact(settings) == settings
    assert redact_text("--tokenizer_name gpt2 --num_input_tokens 5") == "--tokenizer_name gpt2 --num_input_tokens 5"
    assert redact_text("https://user:pass@host/x") == "https://<redacted>@host/x"


def test_the_command_shows_no_paths_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["/opt/python3.11", f"{tmp_path}/train.py", "--data=/home/somebody/my data", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert command_line() == "python train.py '--data=~/my data' --out out"
    assert short_path("/elsewhere/deep/x") == "/path/to/x"


def test_an_installed_command_stands_as_a_person_types_it(monkeypatch):
    folder = os.path.dirname(sys.executable)
    words = [sys.executable, f"{folder}/hf-sai", "run", "train.py", "--optim", "sgd_sai"]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert command_line() == "hf-sai run train.py --optim sgd_sai"


def test_settings_name_neither_the_machine_nor_its_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box-7")
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = {
        "logging_dir": str(tmp_path / "runs" / "Nov26_01-37-12_gpu-box-7"),
        "train_file": [str(tmp_path / "a.txt"), "/home/somebody/b.txt", "/scratch/somebody/c.txt"],
        "nested": {"dir": "/scratch/somebody/d"},
    }
    monkeypatch.chdir(tmp_path)
    recorder = RunRecorder("out")
    recorder.start(model := small_model(), optimizer_of(model), settings=settings)
    assert recorder.record.settings == {
        "logging_dir": "runs/Nov26_01-37-12_HOST",
        "train_file": ["a.txt", "~/b.txt", "/path/to/c.txt"],
        "nested": {"dir": "/path/to/d"},
    }


def test_the_command_begins_with_the_launcher(tmp_path):
    pytest.importorskip("psutil")
    faster = "import sys; sys.modules['transformers'] = None; "
    (tmp_path / "train.py").write_text(
        faster + "from hf_sai.runs.environment import command_line; print(command_line())"
    )
    (tmp_path / "torchrun").write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[3:]])")
    launcher = [sys.executable, tmp_path / "torchrun", "--master_addr", "10.1.2.3", "train.py", "--lr", "1"]
    done = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "torchrun --master_addr HOST train.py --lr 1\n"
    launcher[1] = tmp_path / "wrapper"  # any other program that passes its arguments on
    (tmp_path / "torchrun").rename(launcher[1])
    done = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "python train.py --lr 1\n"


GOOD = {"format": "hf-sai run record", "version": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a run record"),
        ('{"version": 1}', "'format' must be"),
        (GOOD | {"version": 99}, "reads versions 1 to 1; upgrade"),
        (GOOD | {"version": True}, "reads versions 1 to 1"),
        (GOOD | {"history": {}}, "'history' must be a list of objects"),
        (GOOD | {"history": [{"loss": 1.0}]}, r"history\[0\] has no 'step'"),
        (GOOD | {"history": [{"step": "1"}]}, r"history\[0\].step must be an integer"),
        (GOOD | {"run": []}, "'run' must be an object"),
        (GOOD | {"run": {"name": ["x"]}}, "run.name must be a string"),
        (GOOD | {"optimizer": {"groups": "x"}}, "optimizer.groups must be a list"),
        (GOOD | {"optimizer": {"groups": [{"name": "g", "tensors": -1}]}}, r"groups\[0\].tensors must be an integer"),
        (GOOD | {"gsnr": {"parameters": [{"name": "p", "group": "g", "shape": ["x"]}]}}, "shape must be a list of"),
        (GOOD | {"history": [{"step": 10**400}]}, r"history\[0\].step must be an integer from 0 to 2\*\*63"),
        (GOOD | {"timing": {"step_seconds": 10**400}}, "timing.step_seconds must be a finite number"),
        (GOOD | {"settings": {"a": json.loads("[" * 60 + "]" * 60)}}, "nested more than 50 levels deep"),
        (GOOD | {"timing": {"step_seconds": "fast"}}, "timing.step_seconds must be a finite number"),
        ('{"format": "hf-sai run record", "version": 1, "timing": {"step_seconds": NaN}}', "finite number"),
    ],
)
def test_a_malformed_record_is_refused_with_a_reason(tmp_path, content, sentence):
    path = tmp_path / RECORD_FILE
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        RunRecord.load(tmp_path)


def test_a_huge_or_missing_or_binary_record_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        RunRecord.load(tmp_path)
    (tmp_path / RECORD_FILE).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not UTF-8"):
        RunRecord.load(tmp_path)
    with open(tmp_path / RECORD_FILE, "wb") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no room
    with pytest.raises(ValueError, match="is larger than 67,108,864 bytes"):
        RunRecord.load(tmp_path)


def mangled_records(whole, folder, wrongs, fields=tuple(RunRecord.__dataclass_fields__)):
    """Every record that loads with one value in ``fields`` replaced, or missing where ``wrongs`` has KeyError."""

    def places(value, path=()):
        yield path
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            yield from places(child, (*path, key))

    for path, wrong in itertools.product(places({field: whole[field] for field in fields}), wrongs):
        if path:
            mangled = copy.deepcopy(whole)
            place = mangled
            for key in path[:-1]:
                place = place[key]
            if wrong is KeyError:
                del place[path[-1]]
            else:
                place[path[-1]] = wrong
            (folder / RECORD_FILE).write_text(json.dumps(mangled))
            with contextlib.suppress(ValueError):
                yield RunRecord.load(folder)


def test_every_mangled_record_loads_or_is_refused_as_value_error(tmp_path):
    finished_run(tmp_path)
    whole = json.loads((tmp_path / RECORD_FILE).read_text())
    count = 0
    for loaded in mangled_records(whole, tmp_path, (None, [], {}, "<script>", -1, 1e999, [[]], 10**400, KeyError)):
        assert isinstance(loaded.curve("loss"), list)
        assert loaded.name
        assert loaded.optimizer_share is None or isinstance(loaded.optimizer_share, float)
        assert loaded.summary()["optimizer"]
        count += 1
    assert count > 100


def small_whole_record(folder):
    """A record with something in every field, and little of it."""
    finished_run(folder)
    whole = json.loads((folder / RECORD_FILE).read_text())
    whole["history"] = [whole["history"][-1], {"step": 4, "eval_loss": 0.5}]
    whole["gsnr"]["parameters"], whole["gsnr"]["roles"] = whole["gsnr"]["parameters"][:1], whole["gsnr"]["roles"][:1]
    whole["optimizer"]["groups"] = whole["optimizer"]["groups"][:1]
    whole["model"]["adapter"] = {"peft_type": "LORA", "r": 4}
    whole["hardware"]["accelerators"] = [{"name": "one", "memory_bytes": 3}]
    whole["results"]["before training"] = {"loss": 3.0}
    whole["samples"] = [{"title": "t", "text": "x", "prompt": "p"}]
    whole["images"] = [{"title": "t", "file": "x.png"}]
    whole["twins"] = [RunRecord.load(folder).summary()]
    return whole


WRONG = ([], {"a": 1}, 10**400, KeyError)


def test_whatever_loads_has_a_card(tmp_path):
    from hf_sai.publishing.cards import render_card

    for record in mangled_records(small_whole_record(tmp_path), tmp_path, WRONG):
        assert str(render_card(record)).startswith("---\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_loads_has_pictures_or_a_reason(tmp_path):
    from hf_sai.publishing import plots

    drawn = 0
    for record in mangled_records(
        small_whole_record(tmp_path), tmp_path, WRONG, ("run", "optimizer", "gsnr", "history")
    ):
        for plot in (lambda r: plots.plot_loss([r]), plots.plot_gsnr, plots.plot_updates):
            with contextlib.suppress(ValueError):
                drawn += bool(plots.draw(plot(record)))
    assert drawn > 100


# --- whatever a loop hands over, the record can be read again


def started(folder, **options):
    model = small_model()
    recorder = RunRecorder(folder, budget=1.0, **options)
    recorder.start(model, optimizer_of(model))
    return recorder


@pytest.mark.parametrize("step", [np.int64(1), torch.tensor(1), True], ids=repr)
def test_steps_may_be_any_integers(tmp_path, step):
    recorder = started(tmp_path)
    recorder.log(step, {"loss": 1.0})
    recorder.finish()
    assert RunRecord.load(tmp_path).curve("loss") == [(1, 1.0)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda recorder: recorder.log(1.5, {"loss": 1.0}),
        lambda recorder: recorder.log(-1, {"loss": 1.0}),
        lambda recorder: recorder.log("one", {"loss": 1.0}),
        lambda recorder: recorder.add(samples=[{"text": "x"}]),
        lambda recorder: recorder.add(samples=["x"]),
        lambda recorder: recorder.add(images=[{"file": "x.png"}]),
        lambda recorder: recorder.add(data=[{"id": "me/data"}]),
    ],
)
def test_what_no_reader_would_take_costs_a_warning_and_not_the_record(tmp_path, caplog, spoil):
    recorder = started(tmp_path)
    spoil(recorder)
    recorder.finish({"eval_loss": 2.0})
    assert "The run record is incomplete" in caplog.text
    assert RunRecord.load(tmp_path).results == {"eval_loss": 2.0}


def test_a_name_may_be_a_number(tmp_path):
    started(tmp_path, name=5).finish()
    assert RunRecord.load(tmp_path).name == "5"


def test_a_recorder_that_was_not_started_says_what_comes_first(tmp_path, caplog):
    recorder = RunRecorder(tmp_path)
    for _ in range(2):
        with recorder.step(), recorder.update(measure=True):
            pass
    [warning] = caplog.records
    assert "start(model, optimizer) comes first" in warning.getMessage()


def test_a_stopwatch_ignores_a_stop_without_start(monkeypatch):
    watch = Stopwatch()
    watch.stop()
    assert watch.seconds() == 0.0


def test_a_wrong_budget_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"budget is 2, but must be between 0 and 1"):
        RunRecorder(tmp_path, budget=2)


def test_atomic_write_makes_the_folder(tmp_path):
    assert atomic_write(tmp_path / "a" / "b", b"x").read_bytes() == b"x"
    assert recorder_module.logger.name == "hf_sai.runs.recorder"
