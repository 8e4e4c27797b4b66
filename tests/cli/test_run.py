"""``python -m hf_sai.run``: unmodified scripts and modules, under python, torchrun and accelerate launch."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from hf_sai import run
from hf_sai.startup import following

SCRIPT = """
    import json, os, sys
    import neighbour
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(args=[a for a in sys.argv[1:] if a not in ("boom", "-m", "exit")])
    if "boom" in sys.argv:
        raise RuntimeError("as the script says")
    seen = {
        "argv": sys.argv,
        "name": __name__,
        "main": sys.modules["__main__"].__file__,
        "cwd": os.getcwd(),
        "optim": args.optim.value,
        "world_size": args.world_size,
    }
    with open(f"{args.output_dir}.{os.environ.get('RANK', '0')}.json", "w") as file:
        json.dump(seen, file)
    if "exit" in sys.argv:
        sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "scripts" / "neighbour.py").write_text("")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "module.py").write_text(textwrap.dedent(SCRIPT).replace("import neighbour", "from package import other"))
    (package / "other.py").write_text("")
    return tmp_path


def launch(folder, *command, **more):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def read(folder, rank=0):
    return json.loads((folder / f"out.{rank}.json").read_text())


OPTIONS = ["--output_dir", "out", "--optim", "sgd_sai", "--use_cpu"]


def test_a_script_sees_its_own_arguments_main_and_working_directory(folder):
    done = launch(folder, sys.executable, "-m", "hf_sai.run", "scripts/script.py", *OPTIONS, "-m")
    assert done.returncode == 0, done.stderr
    seen = read(folder)
    assert seen["argv"] == ["scripts/script.py", *OPTIONS, "-m"]
    assert seen["name"] == "__main__"
    assert seen["main"] == str(folder.resolve() / "scripts" / "script.py")
    assert seen["cwd"] == str(folder.resolve())
    assert seen["optim"] == "sgd_sai"


def test_a_module_runs_as_main_and_its_exit_code_is_kept(folder):
    done = launch(folder, sys.executable, "-m", "hf_sai.run", "-m", "package.module", *OPTIONS, "exit")
    assert done.returncode == 7, done.stderr
    seen = read(folder)
    assert seen["argv"] == [str(folder.resolve() / "package" / "module.py"), *OPTIONS, "exit"]
    assert seen["name"] == "__main__"


def test_the_traceback_is_the_scripts_own(folder):
    done = launch(folder, sys.executable, "-m", "hf_sai.run", "scripts/script.py", *OPTIONS, "boom")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: as the script says")
    traceback = done.stderr[done.stderr.index("Traceback") :]
    assert f'File "{folder.resolve()}/scripts/script.py", line' in traceback
    assert "hf_sai" not in traceback
    assert "runpy" not in traceback


def test_torchrun_and_accelerate_launch_run_it_too(folder):
    done = launch(
        folder, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0", "-m", "hf_sai.run", "scripts/script.py", *OPTIONS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [read(folder, rank)["world_size"] for rank in (0, 1)] == [2, 2]
    done = launch(
        folder, sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m",
        "hf_sai.run", "scripts/script.py", *OPTIONS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read(folder)["world_size"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required"), (["no.py"], "no script 'no.py' in"), (["-m", "no_such_module"], "No module named")],
)
def test_a_wrong_target_is_a_clear_error(folder, arguments, message):
    done = launch(folder, sys.executable, "-m", "hf_sai.run", *arguments)
    assert done.returncode != 0
    assert message in done.stderr


RUNNERS = (["hf_sai.run"], ["hf_sai", "run"], ["hf_sai", "lr-find"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "no_such_module"], "cannot run 'no_such_module': No module named no_such_module. Give a script"),
        (["-m", "package.no_such"], "cannot run 'package.no_such': No module named package.no_such. Give a script"),
        (["-m", "package"], "cannot run 'package': No module named package.__main__"),
        (["scripts"], "cannot run 'scripts': can't find '__main__' module in"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_in_one_sentence(folder, arguments, message):
    for command in RUNNERS if arguments == ["scripts"] else RUNNERS[:1]:  # the others take their time to start
        done = launch(folder, sys.executable, "-m", *command, *arguments)
        assert done.returncode == (2 if command == ["hf_sai.run"] else 1)
        assert "Traceback" not in done.stderr
        assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "arguments", "file"),
    [
        ("import no_such_module", ["-m", "package"], "package/__init__.py"),
        ("import no_such_module", ["-m", "package.module"], "package/__init__.py"),
        ("import no_such_module", ["broken"], "broken/__main__.py"),
        ("import runpy; runpy.run_module('no_such_module')", ["broken"], "broken/__main__.py"),
        ("open('/no/such/file')", ["-m", "broken"], "broken/__main__.py"),
    ],
    ids=str,
)
def test_what_a_script_cannot_import_or_open_keeps_its_traceback(folder, content, arguments, file):
    (folder / "broken").mkdir()
    (folder / file).write_text(content)
    for command in RUNNERS if arguments == ["-m", "broken"] else RUNNERS[:1]:
        done = launch(folder, sys.executable, "-m", *command, *arguments)
        assert done.returncode == 1
        traceback = done.stderr[done.stderr.index("Traceback") :]
        assert traceback.splitlines()[1].endswith(f'{file}", line 1, in <module>')
        assert "no_such_module" in traceback or "/no/such/file" in traceback


# --- what a script under the runner is like


def both_ways(folder, source, *arguments):
    """The end of a script with and without the runner: exit status, standard output, standard error."""
    (folder / "same.py").write_text(textwrap.dedent(source))
    ends = []
    for runner in ([], ["-m", "hf_sai.run"]):
        done = launch(folder, sys.executable, *runner, "same.py", *arguments)
        ends.append((done.returncode, done.stdout, done.stderr))
    return ends


@pytest.mark.parametrize(
    "source",
    [
        "raise KeyboardInterrupt",
        "import os, signal; print('x'); os.kill(os.getpid(), signal.SIGINT)",
        "import os, sys; os.chdir('/'); print(open(__file__).read(), __file__, sys.argv, __spec__, __name__)",
        "def f():\n  try: 1/0\n  except Exception as e: raise ValueError('x') from e\nf()",
        "import atexit; X = 1; atexit.register(lambda: print('bye', X))",
        "import pickle, __main__\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__, __main__.A is A)",
        "import sys; sys.exit('no data')",
        "def f(:\n  pass",
    ],
)
def test_a_script_ends_as_it_does_without_the_runner(folder, source):
    plain, under_runner = both_ways(folder, source)
    assert plain == under_runner


@pytest.mark.parametrize("target", ["same.py", "folder"])
def test_a_safe_import_path_stays_as_it_is(folder, target):
    (folder / "folder").mkdir()
    source = "import sys, neighbour; print(neighbour.__file__, sys.path)"
    (folder / "folder" / "__main__.py").write_text(source)
    (folder / "same.py").write_text(source)
    path = os.pathsep.join([str(folder / "scripts"), os.environ.get("PYTHONPATH", os.getcwd())])
    ends = [
        launch(folder, sys.executable, *runner, target, PYTHONSAFEPATH="1", PYTHONPATH=path)
        for runner in ([], ["-m", "hf_sai.run"])
    ]
    assert ends[0].returncode == 0, ends[0].stderr
    assert ends[0].stdout == ends[1].stdout


def test_a_scripts_own_hook_shows_its_error_under_both_names_of_the_runner(folder):
    (folder / "hooked.py").write_text("import sys; sys.excepthook = lambda *error: print('seen', error[1]); 1 / 0")
    for runner in (["hf_sai.run"], ["hf_sai", "run"]):
        done = launch(folder, sys.executable, "-m", *runner, "hooked.py")
        assert (done.returncode, done.stdout, done.stderr) == (1, "seen division by zero\n", "")


def test_where_nothing_can_be_noted_nothing_is_claimed(monkeypatch, capsys):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setattr(run, "when_imported", lambda *_: None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop(following.NOTES, None)
    run._follow(record=False)
    run._say_if_ours_was_not_used(["--optim", "sgd_sai"])
    assert capsys.readouterr().err == ""


TRAINS = """
    import sys
    import torch.multiprocessing

    def train(rank, optim, context):
        from small import plain_trainer
        trainer = plain_trainer(f"out-{context}", optim=optim, max_steps=2)
        trainer.train()
        print(context, type(trainer.optimizer.optimizer).__name__, flush=True)

    if __name__ == "__main__":
        for context in sys.argv[2:]:
            if context == "here":
                train(0, sys.argv[1], context)
            else:
                torch.multiprocessing.start_processes(train, (sys.argv[1], context), nprocs=1, start_method=context)
"""


@pytest.fixture
def trains(folder):
    (folder / "trains.py").write_text(textwrap.dedent(TRAINS))
    (folder / "small.py").write_text(SMALL)
    return folder


SMALL = """
import torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

def plain_trainer(folder, **options):
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options}
    rows = [{"x": x, "labels": x.sum()} for x in torch.randn(16, 4)]
    return Trainer(Model(), TrainingArguments(folder, learning_rate=0.01, **options), train_dataset=rows)
"""


def test_workers_of_every_kind_know_the_name(trains):
    done = launch(trains, sys.executable, "-m", "hf_sai.run", "trains.py", "sgd_sai", "here", "spawn", "forkserver")
    assert done.returncode == 0, done.stderr
    words = [line for line in done.stdout.splitlines() if line.endswith("SGDSaI")]
    assert words == ["here SGDSaI", "spawn SGDSaI", "forkserver SGDSaI"]
    said = {line for line in done.stderr.splitlines() if line.startswith("hf_sai.run:")}
    assert said == {"hf_sai.run: 1 process trains with SGD-SaI."}


def test_a_program_that_a_script_starts_knows_the_name_and_its_own_sitecustomize_runs(trains):
    (trains / "theirs").mkdir()
    (trains / "theirs" / "sitecustomize.py").write_text("import os; os.environ['THEIRS'] = 'yes'")
    (trains / "starter.py").write_text(
        "import os, subprocess, sys\n"
        'code = \'import os, sys; print(os.environ.get("THEIRS"), any("startup" in p for p in sys.path))\'\n'
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
        "subprocess.run([sys.executable, 'trains.py', *sys.argv[1:]], check=True)\n"
    )
    path = os.pathsep.join([str(trains / "theirs"), os.environ.get("PYTHONPATH", "")])
    done = launch(trains, sys.executable, "-m", "hf_sai.run", "starter.py", "sgd_sai", "here", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "yes False" in done.stdout
    assert "here SGDSaI" in done.stdout


def test_a_run_without_our_optimizer_says_so_in_one_line(trains):
    done = launch(trains, sys.executable, "-m", "hf_sai.run", "trains.py", "adamw_torch", "here", "spawn")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hf_sai.run:")]
    assert "this run stepped AdamW, and SGD-SaI was not among them" in line
    done = launch(trains, sys.executable, "-m", "hf_sai.run", "trains.py", "sgd_sai")
    assert "this run stepped no optimizer" in done.stderr


def test_a_run_that_steps_nothing_and_was_not_asked_to_says_nothing(folder):
    done = launch(folder, sys.executable, "-m", "hf_sai.run", "scripts/script.py", "--help")
    assert "hf_sai.run:" not in done.stderr


def test_record_leaves_a_record_of_a_script_that_is_not_edited(trains):
    done = launch(trains, sys.executable, "-m", "hf_sai.run", "--record", "trains.py", "sgd_sai", "here", "spawn")
    assert done.returncode == 0, done.stderr
    for context in ("here", "spawn"):
        record = json.loads((trains / f"out-{context}" / "run_record.json").read_text())
        assert record["run"]["status"] == "finished"
        assert record["optimizer"]["name"] == "SGDSaI"
