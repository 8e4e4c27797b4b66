"""Every script of recipes and benchmarks runs from a fresh clone, in whatever folder one stands."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*sorted(ROOT.glob("recipes/*/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]
SCRIPTS = [str(path.relative_to(ROOT)) for path in FILES if '__name__ == "__main__"' in path.read_text()]


def imports(path):
    """(line, top name, whole name) of each import at the top of a file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module.partition(".")[0], node.module


def needs_root(path, seen=()):
    """Whether a file, or one beside it that it imports, imports from `recipes`."""
    siblings = {file.stem: file for file in path.parent.glob("*.py") if file not in (*seen, path)}
    names = {top for _, top, _ in imports(path)}
    return "recipes" in names or any(needs_root(siblings[name], (*seen, path)) for name in names & set(siblings))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_root_is_on_the_path_before_anything_of_ours_is_imported(script):
    path = ROOT / script
    if not needs_root(path):
        return
    depth = len(path.relative_to(ROOT).parts) - 1
    line = f"sys.path.insert(0, str(Path(__file__).resolve().parents[{depth}]))"
    (number,) = [i for i, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(line)]
    early = [
        name for at, top, name in imports(path) if at < number and top not in (*sys.stdlib_module_names, "__future__")
    ]
    assert not early


@pytest.mark.longer
@pytest.mark.parametrize("script", ["recipes/gpt2_pretraining/compare.py", "recipes/vit_classification/benchmark.py"])
def test_a_script_starts_in_any_folder(script, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout
