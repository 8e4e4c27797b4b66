"""Real code that needs no network: the sources of installed packages, split by file."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

from datasets import Dataset, DatasetDict

from recipes.common.recipe_input import InputError
from recipes.common.stdlib_corpus import paragraph_keys, without_paragraphs

__all__ = ["PACKAGES", "load_sources"]

#: Both under the BSD licence with three clauses, and there wherever the recipes are installed.
PACKAGES = ("sklearn", "networkx")
SHARE = 0.03  # of the files, for validation and for test each
TEST_FOLDERS = {"tests", "test", "conftest.py"}


def load_sources(packages: tuple[str, ...] = PACKAGES) -> DatasetDict:
    """The splits train, validation and test with the column text; no paragraph of the others is in train.

    Raises:
        InputError: A package is not installed.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"the package {package} is not installed; its sources are the text to learn.")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent)
            if TEST_FOLDERS.isdisjoint(parts.parts):
                place = zlib.crc32(str(parts).encode()) / 2**32
                split = "validation" if place < SHARE else "test" if place < 2 * SHARE else "train"
                splits[split].append(path.read_text(encoding="utf-8"))
    held_out = {key for split in ("validation", "test") for text in splits[split] for key in paragraph_keys(text)}
    splits["train"] = [kept for text in splits["train"] if (kept := without_paragraphs(text, held_out))]
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in splits.items()})
