"""The optimizer needs torch alone, and a package that is installed is whole."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import importlib.abc
    import sys

    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"transformers", "peft", "accelerate", "datasets", "evaluate", "diffusers"}:
                raise ImportError(f"{name} is not to be imported")

    sys.meta_path.insert(0, Refuse())

    import torch
    from hf_sai import SGDSaI, param_groups

    model = torch.nn.Linear(4, 2)
    optimizer = SGDSaI(param_groups(model, lr=0.1, weight_decay=0.0))
    before = model.weight.detach().clone()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert not {"transformers", "peft", "accelerate", "deepspeed", "hf_sai.distributed.zero"} & set(sys.modules)
    print(optimizer.gsnr_report())
"""


def test_the_optimizer_works_where_transformers_peft_and_accelerate_cannot_be_imported():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 parameters measured" in done.stdout


def test_an_installed_package_has_every_file_that_is_no_module():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_sai"]
    packed = {path for pattern in patterns for path in (root / "hf_sai").glob(pattern)}
    others = {path for path in (root / "hf_sai").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == packed
