"""What the site needs beyond Markdown: links that leave docs/, pictures, the changelog, docstrings.

Pages are written for a reader of the repository, so that `../recipes/x/README.md` is a file there. On the site it is an
address in the repository. A warning here fails `mkdocs build --strict`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

logger = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?\[[^\[\]]*(?:\[[^\]]*\][^\[\]]*)*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
PICTURES = (".png", ".svg", ".jpg")
API = re.compile(r"^::: (\S+)$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures that pages show from elsewhere in the repository, and the changelog as a page."""
    shown = set()
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = (DOCS / page.src_uri).parent.joinpath(target[1].partition("#")[0]).resolve()
            if path.suffix in PICTURES and _leaves_docs(path) and path.is_file():
                shown.add(path)
    for path in shown:
        files.append(File.generated(config, _shown_at(path), abs_src_path=str(path)))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changelog))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/ into addresses in the repository, outside code."""
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _rewritten(link, page, config.repo_url), part) for part in parts[::2]]
    if page.file.src_uri == "api.md":
        _warn_of_missing_docstrings(markdown)
    return "".join(parts)


def _rewritten(link: re.Match[str], page: Any, repository: str) -> str:
    target, _, section = link[2].partition("#")
    path = (DOCS / page.file.src_uri).parent.joinpath(target).resolve()
    if "://" in target or not target or not _leaves_docs(path):
        return link[0]
    if not path.exists():
        logger.warning("%s links to %s, which is not there.", page.file.src_uri, target)
        return link[0]
    inside = path.relative_to(ROOT).as_posix()
    if inside == "CHANGELOG.md":
        target = os.path.relpath("changelog.md", Path(page.file.src_uri).parent)
    elif path.suffix in PICTURES:
        target = os.path.relpath(_shown_at(path), Path(page.file.src_uri).parent)
    else:
        target = f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{inside}"
    return f"{link[1]}{target}{'#' + section if section else ''}{link[3]}"


def _leaves_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)


def _shown_at(path: Path) -> str:
    return f"pictures/{path.relative_to(ROOT).as_posix()}"


def _warn_of_missing_docstrings(markdown: str) -> None:
    """Warn of whatever the reference shows, or would show if it had a docstring, that has none."""
    package = griffe.load("hf_sai", search_paths=[ROOT], resolve_aliases=True)
    for name in API.findall(markdown):
        shown = package[name.removeprefix("hf_sai.")]
        members = shown.members.values() if shown.is_class else []
        public = [member for member in members if member.is_function and not member.name.startswith(("_", "on_"))]
        for part in (shown, *public):
            if not part.has_docstring:
                logger.warning("%s has no docstring.", part.path)
