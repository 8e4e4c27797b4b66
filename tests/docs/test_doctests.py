"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import hf_sai

MODULES = [module.name for module in pkgutil.walk_packages(hf_sai.__path__, "hf_sai.") if module.name != "hf_sai.run"]
NEEDS = {"hf_sai.kernels.triton_kernel": "triton"}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert doctest.testmod(importlib.import_module(name)).failed == 0
