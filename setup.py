"""Gives the package index the README with whole addresses: a link into the repository leads nowhere there."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!\w+:|#)([^)]+\))")


def readme() -> str:
    """The README whose links into the repository are addresses; pictures get that of the file itself."""
    found = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, "pyproject.toml has no [project.urls] Repository."

    def whole(link: re.Match[str]) -> str:
        return f"{link[1]}{link[2]}{found[1]}/{'raw' if link[1] else 'blob'}/main/{link[3]}"

    return LINK.sub(whole, (ROOT / "README.md").read_text())


setup(long_description=readme(), long_description_content_type="text/markdown")
