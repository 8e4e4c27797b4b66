"""``python -m hf_sai.run``: unmodified scripts and modules, under python, torchrun and accelerate launch."""

import os
import subprocess
import sys
import textwrap

import pytest

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


def launch(folder, *command):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def read(folder, rank=0):
    import json

    return json.loads((folder / f"out.{rank}.json").read_text())


OPTIONS = ["--output_dir", "out", "--optim", "sgd_sai", "--use_cpu"]


def test_a_script_sees_its_own_arguments_main_and_working_directory(folder):
    done = launch(folder, sys.executable, "-m", "hf_sai.run", "scripts/script.py", *OPTIONS, "-m")
    assert done.returncode == 0, done.stderr
    seen = read(folder)
    assert seen["argv"] == ["scripts/script.py", *OPTIONS, "-m"]
    assert seen["name"] == "__main__"
    assert seen["main"] == "scripts/script.py"
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
    assert 'File "scripts/script.py", line' in traceback
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
