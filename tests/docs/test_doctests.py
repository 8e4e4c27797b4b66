"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import hf_sai
from recipes import common

MODULES = [
    module.name
    for package in (hf_sai, common)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if module.name.rpartition(".")[2] not in ("run", "__main__")
]
NEEDS = {f"hf_sai.kernels.triton_{name}": "triton" for name in ("device", "step", "factored")}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert doctest.testmod(importlib.import_module(name)).failed == 0
