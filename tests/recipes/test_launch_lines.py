"""Every documented launch line is one that its launcher accepts, and names scripts and configs that exist."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[2]
TEXTS = ["README.md", *(f"{folder}/*" for folder in ("docs", "recipes/accelerate_configs", "recipes/*"))]
LINE = re.compile(r"^[#\s$]*((?:\w+=\S+ )*(?:accelerate launch|torchrun)\s.*)$")
#: A recipe as docs/distributed.md spells it: RECIPE="SCRIPT CONFIG".
RECIPE = re.compile(r'^RECIPE="(\S+) (\S+)"', re.MULTILINE)
#: What the reader puts in.
READERS = {"GPUS": "8", "R": "0", "0_OR_1": "0", "ADDRESS": "10.0.0.1", "ADDRESS_OF_MACHINE_0": "10.0.0.1"}


def launch_lines(file):
    """The launch lines of a text, with the lines that a backslash continues joined to them."""
    found, lines = [], iter(file.read_text(encoding="utf-8").splitlines())
    for line in lines:
        match = LINE.match(line)
        if match and "`" not in line:
            words = match[1]
            while words.rstrip().endswith("\\"):
                words = words.rstrip().rstrip("\\") + next(lines).lstrip("# ")
            found.append(words.partition("  #")[0])
    return found


def all_lines():
    files = sorted({file for pattern in TEXTS for file in ROOT.glob(pattern)})
    texts = [file for file in files if file.suffix in (".md", ".yaml", ".py")]
    return [(str(file.relative_to(ROOT)), line) for file in texts for line in launch_lines(file)]


def recipes():
    return RECIPE.findall((ROOT / "docs/distributed.md").read_text(encoding="utf-8"))


def words_of(line):
    """The line as a shell would split it, with what the reader puts in."""
    words = [READERS.get(word, word) for word in shlex.split(line)]
    while "=" in words[0]:  # environment variables
        words = words[1:]
    return words


@pytest.mark.parametrize(("file", "line"), all_lines())
def test_the_launcher_accepts_the_line_and_its_files_exist(file, line):
    words = words_of(line)
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        if parsed.config_file is not None:
            assert (ROOT / parsed.config_file).is_file()
    else:
        parsed = get_args_parser().parse_args(words[1:])
    for word in (parsed.training_script, *parsed.training_script_args):
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), word


def test_every_config_and_torchrun_has_a_line_for_any_recipe():
    lines = [line for file, line in all_lines() if file == "docs/distributed.md" and line.endswith(" $RECIPE")]
    used = {part for line in lines for part in words_of(line)}
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "recipes/accelerate_configs").iterdir()}
    assert configs <= used
    assert {"torchrun", "--standalone", "--nnodes"} <= used


def test_every_recipe_is_documented_and_exists():
    assert {script for script, _ in recipes()} == {
        str(file.relative_to(ROOT)) for file in ROOT.glob("recipes/*/train.py")
    }
    for script, config in recipes():
        assert (ROOT / script).is_file()
        assert (ROOT / config).is_file()
