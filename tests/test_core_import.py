"""``import hf_sai`` costs torch and no more, whatever else is installed, broken or missing; a package is whole."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What nobody should pay for who only wants the optimizer.
HEAVY = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "matplotlib", "numba", "pandas", "peft", "transformers"}

COUNT = """
    import sys
    import torch
    before = set(sys.modules)
    import hf_sai
    print(len(before), *sorted(set(sys.modules) - before))
"""

REFUSE = """
    import importlib.abc
    import sys

    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"transformers", "peft", "accelerate", "datasets", "evaluate", "diffusers"}:
                raise ImportError(f"{name} is not to be imported")

    sys.meta_path.insert(0, Refuse())
"""

TRAIN = """
    import sys
    import torch
    from hf_sai import SGDSaI, param_groups

    model = torch.nn.Linear(4, 2)
    optimizer = SGDSaI(param_groups(model, lr=0.1, weight_decay=0.0))
    before = model.weight.detach().clone()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    assert not {"transformers", "peft", "accelerate", "deepspeed"} & set(sys.modules)
    print(optimizer.gsnr_report())
"""


def run_python(*sources, path=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (path, ROOT) if p)}
    command = [sys.executable, "-c", "\n".join(map(textwrap.dedent, sources))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_importing_hf_sai_imports_torch_and_hardly_more():
    done = run_python(COUNT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    before, *added = done.stdout.split()
    assert not HEAVY & {name.partition(".")[0] for name in added}
    assert len(added) <= 0.1 * int(before)


def test_the_optimizer_works_where_transformers_peft_and_accelerate_cannot_be_imported():
    done = run_python(REFUSE, TRAIN)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 parameters measured" in done.stdout


def test_broken_packages_beside_it_do_not_break_it(tmp_path):
    for name in ("transformers", "accelerate", "peft", "bitsandbytes", "datasets", "matplotlib"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('half installed')")
    done = run_python(TRAIN, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 parameters measured" in done.stdout


def test_an_installed_package_has_every_file_that_is_no_module():
    tomllib = pytest.importorskip("tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_sai"]
    packed = {path for pattern in patterns for path in (ROOT / "hf_sai").glob(pattern)}
    others = {path for path in (ROOT / "hf_sai").rglob("*") if path.is_file() and path.suffix != ".py"}
    others = {path for path in others if path.parent.name != "__pycache__"}
    assert others == packed
