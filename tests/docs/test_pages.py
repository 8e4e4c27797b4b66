"""What the pages point to is there: files, sections, tests, modules."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*/README.md")})
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page):
    """The names that GitHub gives to a page's sections."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    shown = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)  # the site's reference
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads} | set(shown)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:srcset|src)=\"([^\"]+)\"", text):
        file, _, section = (target[0] or target[1]).partition("#")
        if "://" in file:
            continue
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (section and there.suffix == ".md" and section not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_files_and_modules_in_the_text_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    files = set(re.findall(r"(?<![\w/.-])((?:tests|benchmarks|recipes)/[\w/]+\.(?:py|yaml))", text))
    assert not [file for file in sorted(files) if not (ROOT / file).is_file()]
    modules = set(re.findall(r"\bhf_sai(?:\.[a-z_]\w*)+", text))
    assert not [module for module in sorted(modules) if not is_there(module)]


def is_there(dotted):
    """Whether it is a module, or a name in one."""
    if importlib.util.find_spec("hf_sai") and dotted.count(".") == 0:
        return True
    parent, _, last = dotted.rpartition(".")
    if not is_there(parent):
        return False
    module = importlib.import_module(parent) if importlib.util.find_spec(parent) else None
    return module is not None and (hasattr(module, last) or importlib.util.find_spec(dotted) is not None)
