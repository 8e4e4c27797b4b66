"""What a process under the runner starts with: nothing that costs anything, notes of whose steps it takes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_sai
from hf_sai.startup import following

STARTUP = Path(following.__file__).parent


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """The hook that every optimizer calls after its step."""
    monkeypatch.setenv(following.NOTES, str(tmp_path))
    hooks = []
    following.note_steps(SimpleNamespace(register_optimizer_step_post_hook=hooks.append))
    return hooks[0]


def test_each_class_is_noted_once_and_ours_by_its_name_also_where_it_is_a_subclass(noted, tmp_path):
    class Mine(hf_sai.SGDSaI):
        pass

    parameters = [torch.nn.Parameter(torch.ones(1))]
    for _ in range(2):
        noted(torch.optim.SGD(parameters, lr=0.1), (), {})
    assert following.stepped() == {"SGD"}
    noted(Mine(parameters), (), {})
    assert following.stepped() == {"SGD", "SGDSaI"}
    assert len(list(tmp_path.iterdir())) == 2


def test_wrappers_are_not_noted(noted):
    wrapper = type("AcceleratedOptimizer", (torch.optim.SGD,), {"__module__": "accelerate.optimizer"})
    noted(wrapper([torch.nn.Parameter(torch.ones(1))], lr=0.1), (), {})
    assert following.stepped() == set()


def test_a_folder_that_is_gone_costs_the_line_and_nothing_else(noted, monkeypatch):
    monkeypatch.setenv(following.NOTES, "/nowhere/at/all")
    noted(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), (), {})
    monkeypatch.delenv(following.NOTES)
    assert following.stepped() == set()


@pytest.mark.longer
def test_a_process_that_has_no_use_for_torch_does_not_import_it(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(STARTUP), following.NOTES: str(tmp_path), following.RECORD: "1"}
    code = "import sys; print(*sorted({'torch', 'transformers', 'hf_sai'} & set(sys.modules)), *sys.path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert not {"torch", "transformers", "hf_sai", str(STARTUP)} & set(words)


@pytest.mark.longer
def test_a_process_that_cannot_find_hf_sai_is_as_it_would_have_been(tmp_path):
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "sitecustomize.py").write_text((STARTUP / "sitecustomize.py").read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "startup")}
    done = subprocess.run(
        [sys.executable, "-c", "print(1)"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
