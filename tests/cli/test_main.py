"""The command by its three names."""

import json
import os
import subprocess
import sys

import pytest

from hf_sai import __version__


@pytest.mark.longer
@pytest.mark.parametrize("module", ["hf_sai", "hf_sai.cli"])
def test_the_command_runs_as_a_module(module):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120)

    assert run("--version").stdout == f"hf-sai {__version__}\n"
    nothing = run()
    assert nothing.returncode == 2
    assert "usage: hf-sai" in nothing.stderr


@pytest.mark.longer
def test_torchrun_starts_the_command():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "hf_sai.cli"]
    done = subprocess.run([*launcher, "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"hf-sai {__version__}\n", done.stderr


@pytest.mark.longer
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 8, "n_layer": 1, "n_head": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        command = [sys.executable, "-m", "hf_sai", "memory", str(tmp_path)]
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
