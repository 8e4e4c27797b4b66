"""CONTRIBUTING names every floor of the package, and nothing that is not there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:hf_sai|recipes|benchmarks|tests|docs|model_cards)/[\w./]*)`", TEXT)))


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_is_there(name):
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file()


def test_every_folder_of_the_package_is_a_floor():
    folders = {f"hf_sai/{folder.name}/" for folder in (ROOT / "hf_sai").iterdir() if list(folder.glob("*.py"))}
    floors = set(re.findall(r"^\| `(hf_sai/\w+/)`", TEXT, re.MULTILINE))
    assert floors == folders
    assert {f"hf_sai/{file.name}" for file in (ROOT / "hf_sai").glob("*.py")} <= set(NAMED)


def test_the_tests_mirror_the_floors():
    missing = {
        floor
        for floor in re.findall(r"^\| `hf_sai/(\w+)/`", TEXT, re.MULTILINE)
        if not (ROOT / "tests" / floor).is_dir()
    }
    assert not missing


def test_every_file_says_its_one_job_on_its_first_line():
    files = [*(ROOT / "hf_sai").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    without = [str(file.relative_to(ROOT)) for file in files if not re.match(r'r?"""\S', file.read_text())]
    assert not without


@pytest.mark.longer
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_nothing_is_committed_that_git_is_to_ignore():
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout == ""
