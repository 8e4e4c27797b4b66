"""One version and one address, wherever they are written; what the package index shows leads somewhere."""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_sai

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
URLS = dict(re.findall(r'^(\w+) = "(https://.+)"$', PROJECT, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_stands_in_one_place_and_all_others_equal_it():
    assert "version = { attr" in PROJECT
    assert not re.search(r'^version = "', PROJECT, re.MULTILINE)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hf_sai.__version__
    assert f"\n## {hf_sai.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"hf-sai {hf_sai.__version__}\n" in (ROOT / "docs" / "commands.md").read_text()


def test_every_address_of_the_project_is_that_of_pyproject():
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.yml"), *ROOT.glob("*.cff"), *ROOT.glob("docs/**/*.md")]
    files += [*ROOT.glob(".github/**/*.yml"), *ROOT.glob("notebooks/*.ipynb")]
    owner = URLS["Repository"].removeprefix("https://github.com/")
    for file in files:
        text = file.read_text(encoding="utf-8")
        of_ours = [name for name in re.findall(r"github\.com/(?:github/)?([\w-]+/[\w-]+)", text) if "sai" in name]
        assert {*of_ours} <= {owner}, file
        sites = re.findall(r"https://[\w-]+\.github\.io/[\w-]+/", text)
        assert {*sites} <= {URLS["Documentation"]}, file


def test_the_index_shows_the_readme_with_whole_addresses(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    spec = importlib.util.spec_from_file_location("setup_of_hf_sai", ROOT / "setup.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    text = given["long_description"]
    assert f"]({URLS['Repository']}/raw/main/docs/headline.png)" in text
    assert f"]({URLS['Repository']}/blob/main/docs/results.md)" in text
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", text))


def test_the_pythons_that_are_declared_are_those_that_are_tested():
    declared = re.findall(r"Python :: (3\.\d+)", PROJECT)
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert tests["jobs"]["python"]["strategy"]["matrix"]["python"] == declared
    assert f'requires-python = ">={declared[0]}"' in PROJECT


@pytest.mark.skipif(sys.version_info[:2] != (3, 11) or torch.version.cuda is not None, reason="pinned for others")
def test_whatever_an_extra_brings_along_is_pinned():
    def brought(name, extra):
        try:
            wanted = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            return
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield from ((canonicalize_name(requirement.name), more) for more in ("", *requirement.extras))

    todo, seen = [("hf-sai", extra) for extra in metadata.metadata("hf-sai").get_all("Provides-Extra")], set()
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += brought(*one)
    here = {canonicalize_name(distribution.name) for distribution in metadata.distributions()}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {name for name, _ in seen} & here - {"hf-sai", "setuptools"} <= {*map(canonicalize_name, pinned)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_that_make_knows(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(re.findall(r"run: make ([\w-]+)", path.read_text()))
    assert called <= targets
