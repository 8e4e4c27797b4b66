"""The notebooks open in Colab and run from top to bottom; that of diffusers is run beside its recipe's tests."""

import importlib.util
import json
import re

import pytest

from notebooks import NOTEBOOKS, ROOT, cells, run_notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_says_what_to_install_and_what_to_change(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = "".join(notebook["cells"][0]["source"])
    repository = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    in_colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({in_colab}/blob/main/notebooks/{path.name})" in first
    (install,) = cells(notebook, "install")
    assert f"git+{repository}" in "".join(install["source"])
    assert len(cells(notebook, "parameters")) == 1
    assert path.name in (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")


def test_every_notebook_is_run():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_notebook*.py"))
    assert [path.name for path in NOTEBOOKS if f'run_notebook("{path.name}"' not in tests] == []


@pytest.mark.slow
def test_gpt2_from_scratch(tmp_path):
    run_notebook("gpt2_from_scratch.ipynb", tmp_path, parameters="STEPS = 300", run="runs/sgd_sai_factored")


@pytest.mark.slow
def test_smollm2_lora(tmp_path):
    from trl import ModelConfig

    from recipes.llama_lora.base_model import OFFLINE_PACKAGE, load_base

    if importlib.util.find_spec(OFFLINE_PACKAGE) is None:
        pytest.skip(f"{OFFLINE_PACKAGE} is not installed")

    for part in load_base(ModelConfig(dtype="float32")):  # the model that a package carries, unpacked into a folder
        part.save_pretrained(tmp_path / "model")
    parameters = f"MODEL, STEPS = {str(tmp_path / 'model')!r}, 8"
    run_notebook("smollm2_lora.ipynb", tmp_path, parameters=parameters, run="runs/smollm2_lora")
