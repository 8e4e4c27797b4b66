"""The measurement on a GPU, rehearsed on the CPU in tiny sizes: every part leaves JSON, and a page is made of it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import correctness, quality, report, step_times
from benchmarks.gpu.contenders import ADAMW, RIVALS, RULES, Contender, kernels, sai
from benchmarks.gpu.device import Device
from benchmarks.gpu.part import Part
from hf_sai.optim.rules import factored

pytestmark = pytest.mark.timeout(1800)  # whichever test comes first runs all parts

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"

FINE = """
from benchmarks.gpu.part import Part
with Part("fine", None) as part:
    part.results["rows"] = [1]
    with part.attempt("a row"):
        raise OSError("no disk")
"""
BROKEN = FINE.replace('"fine"', '"broken"') + "    part.results['rows'].append(2); part.save(); 1 / 0\n"
KILLED = FINE.replace('"fine"', '"killed"') + "    import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
ENDLESS = "import time; time.sleep(600)"


#: In Python's place: tells its own number and its arguments, then does what a test wants.
STAND_IN = """#!/bin/bash
cd {folder}; echo $$ >>pids; echo "$2" >>begun
{does}
"""


def run(*arguments, python=sys.executable, script=RUN, **more):
    environment = {**os.environ, "PYTHON": str(python), **more}
    command = [script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def stand_in(folder, does):
    path = folder / "python"
    path.write_text(STAND_IN.format(folder=folder, does=does))
    path.chmod(0o755)
    return path


def until(true, seconds=60):
    last = time.monotonic() + seconds
    while not true() and time.monotonic() < last:
        time.sleep(0.05)
    assert true()


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(the run, its folder) of one rehearsal of all parts."""
    folder = tmp_path_factory.mktemp("rehearsal")
    return run("--rehearse", folder), folder


def part(rehearsal, name):
    return json.loads((rehearsal[1] / f"{name}.json").read_text())


@pytest.mark.longer
@pytest.mark.parametrize("name", report.PARTS)
def test_every_part_comes_to_its_end_and_leaves_nothing_out(rehearsal, name):
    ran, folder = rehearsal
    assert ran.returncode == 0, ran.stdout[-3000:]
    found = part(rehearsal, name)
    assert (found["status"], found["not_measured"], found["rehearsal"]) == ("complete", {}, True)
    assert f"== {name}: complete" in (folder / "log.txt").read_text()


@pytest.mark.longer
def test_the_rehearsal_finds_every_rule_and_path_right(rehearsal):
    cases = {case["case"]: case for case in part(rehearsal, "correctness")["results"]["cases"]}
    assert [case for case in cases.values() if case["outcome"] != "passed"] == []
    for rule in RULES:
        assert {f"{rule}, {path}, bfloat16" for path in correctness.PATHS} <= set(cases)
        assert {f"{rule}, default, {what}" for what in ("no step waits", "two streams", "graph capture")} <= set(cases)
        assert rule == "averaged" or f"{rule}, torch.compile of the step" in cases


@pytest.mark.longer
def test_the_rehearsal_measures_every_contender(rehearsal):
    for model, (name, dtype) in zip(part(rehearsal, "step_times")["results"]["models"], step_times.MODELS, strict=True):
        assert model["model"] == name
        assert [row["optimizer"] for row in model["rows"]] == [one.name for one in step_times.contenders(dtype)]
        assert all(row["ratio"]["median"] > 0 and row["limit_seconds"] > 0 for row in model["rows"])
    memory = part(rehearsal, "peak_memory")["results"]["rows"]
    released = [row for row in memory if "gradient release" in row["optimizer"]]
    assert released
    assert all((row["gradient_bytes"] == 0) == (row in released) for row in memory)
    quality = part(rehearsal, "quality")["results"]
    for one in quality["runs"]:
        losses = [one["learning_rate"] for one in one["search"]]
        assert one["learning_rate"] in losses
        assert one["long"]["points"][-1]["eval_loss"] < one["long"]["points"][0]["eval_loss"]
        assert one["long"]["points"][-1]["eval_batches"] <= quality["task"]["text"]["validation_tokens"] // 128
    assert {row["optimizer"] for row in quality["whole_steps"]["rows"]} == {one["optimizer"] for one in quality["runs"]}
    engines = part(rehearsal, "engines")["results"]["rows"]
    alone = {row["optimizer"]: row["losses"] for row in engines if row["engine"] == "none"}
    assert all(row["losses"] == pytest.approx(alone[row["optimizer"]], abs=1e-4) for row in engines)


@pytest.mark.longer
def test_the_page_of_a_rehearsal_has_every_section_and_says_what_it_is(rehearsal, tmp_path):
    report.main([str(rehearsal[1]), "--output", str(tmp_path)])
    text = (tmp_path / "gpu.md").read_text()
    assert "no number here means anything" in text
    for section in ("Bars", "Correctness", "Time of a step", "Peak memory", "Quality", "The first step", "FSDP2"):
        assert f"\n## {section}" in text
    assert "## Not measured" not in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("gpu_step_times.png", "gpu_quality.png"))
    report.main(["--output", str(tmp_path)])
    assert (tmp_path / "gpu.md").read_text() == text
    with pytest.raises(SystemExit, match="holds a rehearsal, whose numbers mean nothing"):
        report.main([str(rehearsal[1])])


@pytest.mark.longer
def test_parts_that_fail_or_are_cut_off_leave_what_they_have_and_stop_nothing(tmp_path):
    for name, text in (("endless", ENDLESS), ("broken", BROKEN), ("killed", KILLED), ("fine", FINE)):
        (tmp_path / f"{name}.py").write_text(text)
    ran = run("--rehearse", tmp_path / "out", *(f"{tmp_path}/{name}.py:9" for name in ("broken", "killed", "fine")))
    assert ran.returncode == 1
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("broken", "killed", "fine")}
    assert found["broken"]["status"] == "failed: ZeroDivisionError: division by zero"
    assert found["broken"]["results"] == {"rows": [1, 2]}
    assert found["killed"]["status"] == "cut off"
    assert found["fine"]["status"] == "complete"
    assert all(one["not_measured"] == {"a row": "OSError: no disk"} for one in found.values())
    assert "3 parts, 2 failed or cut off" in ran.stdout

    ran = run(tmp_path / "out", f"{tmp_path}/endless.py:1", f"{tmp_path}/endless.py:0")
    assert ran.returncode == 1
    assert ran.stdout.count("cut off after") == 2


@pytest.mark.longer
def test_options_that_mean_nothing_are_refused(tmp_path):
    for arguments, said in (
        (["--rehears"], "--rehears is no option"),
        ([tmp_path, "quality"], "quality is no PART:SECONDS"),
        ([tmp_path, "quality:-5"], "quality:-5 is no PART:SECONDS"),
        ([tmp_path, "quality:08"], "quality:08 is no PART:SECONDS"),
        ([tmp_path, "quality:99999999999999999999"], "is no PART:SECONDS"),
        ([tmp_path, "speed:5"], "there is no part speed"),
        ([tmp_path, "models:5"], "there is no part models"),  # a file beside the parts, which measures nothing
        ([tmp_path, "run.sh:5"], "there is no part run.sh"),
    ):
        ran = run(*arguments)
        assert ran.returncode == 2
        assert said in ran.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.longer
def test_what_an_earlier_run_left_is_not_taken_for_this_one(tmp_path):
    for name in ("correctness", "engines"):
        (tmp_path / f"{name}.json").write_text("{}")
    ran = run(tmp_path, "correctness:0")
    assert "correctness: cut off after 0 seconds" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "engines.json", "log.txt"]
    assert (tmp_path / "before" / "correctness.json").read_text() == "{}"


@pytest.mark.longer
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_what_was_started_and_a_second_run_waits_for_no_part(number, status, tmp_path):
    python, out = stand_in(tmp_path, "exec sleep 600"), tmp_path / "out put"
    command = [RUN, "out put", "quality:600"]
    environment = {**os.environ, "PYTHON": str(python)}
    ran = subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell keeps ignoring what nohup ignores
    )
    until(lambda: (tmp_path / "pids").is_file())
    second = run(out, "engines:5", python=python)
    assert (second.returncode, second.stderr.splitlines()[0]) == (2, f"run.sh: another run still writes into {out}")
    ran.send_signal(number)
    assert ran.wait(60) == status
    for process in (tmp_path / "pids").read_text().split():
        until(lambda process=process: not lives(process))
    assert (out / "log.txt").read_text().endswith("== ended by a signal\n")


@pytest.mark.longer
def test_the_text_is_made_before_anything_is_timed_and_takes_no_more_than_its_time(tmp_path):
    does = "if [[ $2 == *.text ]]; then sleep 2; touch made; else [[ $2 == *.correctness || -f made ]]; fi"
    parts = ("correctness:60", "step_times:60", "quality:60")
    ran = run(tmp_path / "out", *parts, python=stand_in(tmp_path, does))
    assert ran.stdout.count(": complete") == 3, ran.stdout
    ran = run(tmp_path / "out", "quality:2", python=stand_in(tmp_path, "exec sleep 600"))
    assert "quality: cut off after 0 seconds" in ran.stdout
    for process in (tmp_path / "pids").read_text().split():
        until(lambda process=process: not lives(process))


@pytest.mark.longer
def test_wheels_that_cannot_be_installed_stop_no_part(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1-py3-none-any.whl").write_text("no archive")
    for name in ("benchmarks", "hf_sai", "recipes", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "fine.py").write_text(FINE)
    script = tmp_path / "benchmarks" / "gpu" / "run.sh"
    ran = run("--rehearse", tmp_path / "out", f"{tmp_path}/fine.py:60", script=script)
    assert ran.returncode == 1
    assert "wheels/ cannot be installed here" in ran.stdout
    assert json.loads((tmp_path / "out" / "fine.json").read_text())["status"] == "complete"


@pytest.mark.longer
def test_the_log_is_whole_when_the_run_has_ended(tmp_path):
    (tmp_path / "tee").write_text('#!/bin/sh\nsleep 1\nexec /usr/bin/tee "$@"\n')
    (tmp_path / "tee").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with open(os.devnull, "w") as nowhere:  # a pipe would be waited for
        subprocess.run([RUN, tmp_path / "out", "engines:0"], env=environment, stdout=nowhere, stderr=nowhere)
    assert "1 parts, 1 failed or cut off" in (tmp_path / "out" / "log.txt").read_text()


# --- the page


def test_the_page_in_the_docs_is_what_the_report_makes():
    kept = ROOT / "docs" / "gpu.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    assert (ROOT / "docs" / "gpu.md").read_text() == report.page(results)


def test_without_results_the_page_says_so_in_one_line(tmp_path):
    report.main(["--output", str(tmp_path)])
    assert report.NOTHING in (tmp_path / "gpu.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.md"]
    with pytest.raises(SystemExit, match="holds none of"):
        report.main([str(tmp_path), "--output", str(tmp_path)])


def ratios(**of):
    rows = [
        {"optimizer": name, "ratio": {"median": ratio}}
        for name, ratio in ((f"SGD-SaI {key}".replace("_", ", "), value) for key, value in of.items())
    ]
    rows.append({"optimizer": step_times.SGD, "ratio": {"median": 0.5}})
    return {"step_times": {"results": {"models": [{"model": "gpt2-xl", "rows": rows}]}}}


def bars(results):
    return [line.split(" | ") for line in report._bars(results).splitlines() if "/" in line]


def test_the_bars_judge_what_users_get_and_name_a_path_that_would_pass():
    found = bars(ratios(published=0.9, published_fused=0.54, factored=1.0, factored_fused=1.2))
    assert [row[2:] for row in found] == [
        ["0.90", "0.54 (fused)", "only with fused |"],
        ["1.80", "1.08 (fused)", "only with fused |"],
        ["1.00", "1.00 (default)", "yes |"],
        ["not measured", "", "not measured |"],
    ]
    assert bars(ratios(published=0.75))[0][2:] == ["0.75", "0.75 (default)", "yes |"]
    assert bars(ratios(published=0.76))[0][2:] == ["0.76", "0.76 (default)", "no |"]
    smaller = ratios(published=0.75)  # where not all layers fit
    smaller["step_times"]["results"]["models"][0]["parameters"] = 600_000_000
    assert "Steps with 0.6 billion float32 parameters" in report._bars(smaller)
    whole = {"rows": [{"optimizer": "SGD-SaI orthogonal", "ratio": ratio} for ratio in (1.06,)]}
    assert bars({"quality": {"results": {"whole_steps": whole}}})[3][2:] == ["1.060", "", "no |"]


def test_a_file_of_a_part_that_was_cut_off_at_once_makes_a_page():
    names = ("card", "date", "python", "torch", "cuda", "triton", "transformers", "numba", "bitsandbytes")
    machine = dict.fromkeys(names, "x")
    results = {
        name: {"status": "cut off", "seconds": 1.0, "rehearsal": False, "environment": machine, "results": {},
               "not_measured": {"a row": "OutOfMemoryError: x"}, "warnings": []}
        for name in report.PARTS
    }  # fmt: skip
    text = report.page(results)
    assert "- a row: `OutOfMemoryError: x`" in text
    assert "- quality: `cut off`" in text
    assert "None" not in text


def measured(folder, name, **more):
    machine = dict.fromkeys(("card", "date", "python", "torch", "cuda", "triton", "transformers", "numba"), "x")
    environment = {**machine, "bitsandbytes": "x", **more.pop("environment", {})}
    content = {"part": name, "status": "complete", "seconds": 1.0, "rehearsal": False, "environment": environment,
               "results": {}, "not_measured": {}, "warnings": [], **more}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "quality.json is no JSON"),
        ("[]", "quality.json is no JSON of a part"),
        ("{}", "quality.json was not written by the part quality"),
        ('{"part": "engines"}', "quality.json was not written by the part quality"),
        ('{"part": "quality"}', "holds what no part of this version writes \\(KeyError: 'environment'\\)"),
    ],
)
def test_a_file_that_no_part_has_written_is_refused_and_nothing_is_written(content, said, tmp_path):
    measured(tmp_path / "in", "correctness")
    (tmp_path / "in" / "quality.json").write_text(content)
    with pytest.raises(SystemExit, match=said):
        report.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_results_of_two_machines_are_not_mixed(tmp_path):
    measured(tmp_path, "correctness")
    measured(tmp_path, "quality", environment={"card": "another", "date": "y"})
    with pytest.raises(SystemExit, match=r"card of correctness\.json is x, of quality\.json another"):
        report.main([str(tmp_path), "--output", str(tmp_path)])
    measured(tmp_path, "quality", environment={"date": "y"})
    report.main([str(tmp_path), "--output", str(tmp_path)])
    assert "x, x and y; python x" in (tmp_path / "gpu.md").read_text()


def test_a_rehearsal_does_not_reach_the_docs_by_another_spelling_of_their_folder(tmp_path, monkeypatch):
    measured(tmp_path, "correctness", rehearsal=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="holds a rehearsal"):
        report.main([".", "--output", "docs"])
    assert not list((tmp_path / "docs").iterdir())


def test_a_message_on_the_page_breaks_no_table_and_counts_as_no_words(tmp_path):
    message = "a | b <x> `c`\n" + "long " * 30
    case = {"case": "one", "outcome": "failed", "reason": message}
    measured(tmp_path, "correctness", results={"cases": [case]}, status=f"failed: {message}", warnings=[message])
    report.main([str(tmp_path), "--output", str(tmp_path)])
    text = (tmp_path / "gpu.md").read_text()
    assert "| one | failed | `a \\| b <x> 'c' long" in text
    assert "| correctness | `failed: a \\| b <x> 'c' long" in text
    assert "- warning: `a | b <x> 'c' long" in text


# --- step times and quality


def test_each_optimizer_finds_new_gradients(monkeypatch, tmp_path):
    """Rules change gradients in place; without any, later optimizers would have nothing to do."""
    least = []

    def measured(part, model, contender, baseline):
        least.append(min(p.grad.abs().max().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad.zero_()
        raise TimeoutError

    monkeypatch.setattr(step_times, "measured", measured)
    with Part("step_times", None, ["--rehearse", "--output", str(tmp_path)]) as part:
        part.results |= {"copy_bytes_per_second": 1.0, "models": []}
        step_times.measure(part, "gpt2-xl", torch.float32)
    assert len(least) == len(step_times.contenders(torch.float32))
    assert min(least) > 0


def test_the_memory_of_measuring_is_not_that_of_a_step():
    class Counting(Device):
        high = steps = 0

        def seconds(self, work):
            self.steps += 1
            self.high = max(self.high, 1000 if self.steps == 1 else 150)
            return super().seconds(work)

        def allocated(self):
            return 100

        def reset_peak(self):
            self.high = 100

        def peak(self):
            return self.high

    model = correctness.Tensors(torch.device("cpu"), shapes=[(4, 3), (5,)])
    model.set_gradients(0)
    part = SimpleNamespace(device=Counting(rehearse=True), rehearse=True, results={"copy_bytes_per_second": 1.0})
    baseline = RIVALS[ADAMW].build(model, 1e-6, 0.0)
    assert step_times.measured(part, model, sai("published"), baseline)["temporary_bytes"] == 50


def test_what_averages_its_weights_is_evaluated_at_their_mean_and_keeps_its_rate():
    model = correctness.Tensors(torch.device("cpu"), shapes=[(4, 3), (5,)])
    contender, built, evaluated = sai("averaged"), [], []

    def build(*args):
        built.append(contender.build(*args))
        return built[-1]

    def validation_loss(batches):
        (group,) = built[-1].param_groups[:1]
        evaluated.append((group["means_shown"], group["lr"], batches))
        return 1.0

    task = SimpleNamespace(
        device=Device(rehearse=True), model=model, validation_batches=20, validation_loss=validation_loss,
        restart=lambda: None, loss=lambda step: sum(p.square().sum() for p in model.parameters()),
    )  # fmt: skip
    one = quality.Trained(Contender("averaged", build), averages=True)
    points = quality.train(task, one, 1e-3, 20, math.inf, 4)["points"]
    assert evaluated == [(True, 1e-3, 8)] * 3 + [(True, 1e-3, 20)]
    assert [point["eval_batches"] for point in points] == [8, 8, 8, 20]
    assert built[-1].param_groups[0]["means_shown"] is False


# --- the cases of correctness


def test_a_case_fails_if_a_step_is_a_little_wrong(monkeypatch):
    from hf_sai.optim.rules import RULES

    device = Device(rehearse=True)
    work = lambda: correctness.trained(device, "published", torch.float32)  # noqa: E731
    assert correctness.judged(work)["outcome"] == "passed"
    right = RULES["published"].scale
    monkeypatch.setattr(RULES["published"], "scale", lambda *args: 1.001 * right(*args))
    wrong = correctness.judged(work)
    assert wrong["outcome"] == "failed"
    assert wrong["off"] > 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"foreach": False}, {"momentum_dtype": "8bit"}, {"momentum_dtype": "4bit"}, {"stochastic_rounding": True}],
    ids=str,
)
def test_no_step_after_the_first_reads_a_number_from_the_device(rule, dtype, options):
    """On tensors without data, of which nothing can be read, and which are on no CPU, steps go GPUs' ways."""
    if rule == "averaged" and "momentum_dtype" in options:
        pytest.skip("its mean is in float32")
    model = correctness.Tensors(torch.device("meta"), dtype)
    optimizer = correctness.built(model, rule, **options)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
        if p.numel():
            optimizer.state[p]["gsnr"] = 1.0  # as the first step would measure it
    for _ in range(3):
        optimizer.step()
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    assert {value.device.type for value in states if isinstance(value, torch.Tensor)} == {"meta"}
    with pytest.raises(RuntimeError):
        next(model.parameters()).sum().item()


def test_a_case_without_a_kernel_is_without_what_that_makes_beside_the_update():
    parts_made = []
    faster = factored.FASTER[:]
    factored.FASTER[:] = [lambda parts: parts_made.append(parts) or {}]
    try:
        for without, made in (("", 1), ("triton", 0)):
            parts_made.clear()
            with kernels(without):
                factored.Factored().factors([])
            assert len(parts_made) == made
            assert len(factored.FASTER) == 1
    finally:
        factored.FASTER[:] = faster


def test_what_is_not_installed_is_no_failure():
    def missing():
        raise ImportError("needs bitsandbytes")

    assert correctness.judged(missing) == {"outcome": "not run", "reason": "needs bitsandbytes"}


def test_without_a_gpu_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="There is no CUDA device here"):
        correctness.Part("correctness", None, ["--output", str(tmp_path)])


def test_rivals_are_torchs_own():
    model = correctness.Tensors(torch.device("cpu"), shapes=[(4, 3), (5,)])
    for contender in RIVALS.values():
        optimizer = contender.build(model, 1e-3, 0.1)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))
    assert RIVALS[ADAMW].build(model, 1e-3, 0.1).param_groups[0]["fused"]
